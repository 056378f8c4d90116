"""`titan-convert download` against a server that speaks the hub's API: what it lists, refuses and resumes."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from titan_ckpt.errors import CheckpointError
from titan_convert import download as downloading
from titan_convert.cli import main

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 100_000,
    "pytorch_model.bin": b"pickled",
    "README.md": b"# model",
    "original/params.json": b"{}",
}


class Hub(ThreadingHTTPServer):
    """One public repository, one gated one whose token is `hf_good`, and nothing else."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.sent: list[tuple[str, int]] = []
        self.cut_at: int | None = None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        repo = next((name for name in ("me/open", "me/gated") if f"/{name}/" in f"{path}/"), None)
        if repo is None:
            return self.refuse(401, "RepoNotFound", body)
        if repo == "me/gated" and self.headers.get("Authorization") != "Bearer hf_good":
            return self.refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo", body)
        if path.startswith(f"/api/models/{repo}"):
            if "/revision/" in path and not path.endswith(("/main", COMMIT)):
                return self.refuse(404, "RevisionNotFound", body)
            return self.send(self.listing(repo, "/tree/" in path), {"Content-Type": "application/json"}, body)
        name = re.sub(rf"^/{repo}/resolve/[^/]+/", "", path)
        if name not in FILES:
            return self.refuse(404, "EntryNotFound", body)
        return self.file(name, body)

    def listing(self, repo: str, tree: bool) -> bytes:
        if tree:
            entries = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in FILES.items()]
            return json.dumps(entries).encode()
        siblings = [{"rfilename": name} for name in FILES]
        return json.dumps({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "private": False}).encode()

    def file(self, name: str, body: bool) -> None:
        content, digest = FILES[name], hashlib.sha256(FILES[name]).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        stop = int(wanted[2]) + 1 if wanted and wanted[2] else len(content)
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        if body:
            self.server.sent.append((name, start))
        if body and self.server.cut_at is not None and name == "model.safetensors":
            cut_at, self.server.cut_at = self.server.cut_at, None
            self.send_response(206 if wanted else 200)
            for key, value in {**headers, "Content-Length": str(stop - start)}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[start:cut_at])
            self.close_connection = True  # the line breaks in the middle
            return
        self.send(content[start:stop], headers, body, 206 if wanted else 200)

    def refuse(self, status: int, code: str, body: bool) -> None:
        self.send(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, body, status)

    def send(self, content: bytes, headers: dict[str, str], body: bool, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def download(hub: Hub, home: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it: the hub's address and cache are read when its package is imported."""
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HOME": str(home / "hf-home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, "-m", "titan_convert", "download", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "HF_TOKEN"} | settings | environment,
    )


def found(folder: Path) -> set[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name for name in names if not name.startswith(".cache/")}


def test_all_that_a_model_needs_and_no_pickles(hub: Hub, tmp_path: Path) -> None:
    result = download(hub, tmp_path, "me/open", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert found(tmp_path / "out") == FILES.keys() - {"pytorch_model.bin", "README.md"}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert "fetched me/open into" in result.stdout
    before = len(hub.sent)
    assert download(hub, tmp_path, "me/open", tmp_path / "out").returncode == 0
    assert len(hub.sent) == before  # what is whole is not fetched again


def test_only_what_was_asked_for(hub: Hub, tmp_path: Path) -> None:
    assert download(hub, tmp_path, "me/open", tmp_path / "out", "--assets", "tokenizer", "config").returncode == 0
    assert found(tmp_path / "out") == FILES.keys() - {"pytorch_model.bin", "README.md", "model.safetensors"}


def test_a_gated_repository_says_what_to_do_and_takes_a_token(hub: Hub, tmp_path: Path) -> None:
    arguments = ("me/gated", tmp_path / "out", "--assets", "config")
    for environment in ({}, {"HF_TOKEN": "hf_bad"}):
        result = download(hub, tmp_path, *arguments, **environment)
        assert result.returncode == 1
        assert "me/gated is gated" in result.stderr
        assert "https://huggingface.co/me/gated" in result.stderr
        assert "Traceback" not in result.stderr
    assert download(hub, tmp_path, *arguments, HF_TOKEN="hf_good").returncode == 0
    assert download(hub, tmp_path, *arguments, "--token", "hf_good").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("me/absent",), "There is no repository me/absent that you may see"),
        (("me/open", "--revision", "old"), "me/open has no revision 'old'"),
        (("not/a/name",), "is no name of a repository"),
    ],
)
def test_what_does_not_exist_is_one_paragraph(
    hub: Hub, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = download(hub, tmp_path, arguments[0], tmp_path / "out", *arguments[1:])
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_file_that_broke_off_is_continued(hub: Hub, tmp_path: Path) -> None:
    hub.cut_at = 23_000_000
    result = download(hub, tmp_path, "me/open", tmp_path / "out", "--assets", "weights")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    (_, first), (_, second) = hub.sent
    assert first == 0
    assert second > 10_000_000


def test_what_the_hub_says_of_the_files_is_verified(hub: Hub, tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}'
    whole = len(header).to_bytes(8, "little") + header + bytes(8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FILES, "model.safetensors", whole)
        assert download(hub, tmp_path, "me/open", tmp_path / "out").returncode == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    (tmp_path / "out" / "model.safetensors").write_bytes(whole[:-1] + b"!")
    assert main(["verify", str(tmp_path / "out")]) == 1


def test_a_hub_that_cannot_be_reached_is_told(hub: Hub, tmp_path: Path) -> None:
    result = download(hub, tmp_path, "me/open", tmp_path / "out", HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 1
    assert "me/open could not be fetched" in result.stderr


@pytest.mark.parametrize("breaks", [4, 5])
def test_a_line_that_breaks_again_and_again_is_given_up_after_five(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: int
) -> None:
    """Whatever huggingface-hub does by itself."""
    tried = []

    def fetch(*_: object, **__: object) -> str:
        tried.append(1)
        if len(tried) <= breaks:
            raise httpx.RemoteProtocolError("the line broke")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(CheckpointError, match="the line broke Run again") if breaks == 5 else contextlib.nullcontext():
        assert downloading.download("me/open", tmp_path) == tmp_path
    assert len(tried) == 5
