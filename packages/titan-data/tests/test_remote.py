import gzip
import json
import os
import subprocess
import sys
import uuid

import fsspec
import pytest
from fsspec.registry import _registry as known_stores

from titan_data.config import DataConfig
from titan_data.errors import DataError, MissingPackageError
from titan_data.sources import open_source


def line(text):
    return json.dumps({"text": text}).encode() + b"\n"


@pytest.fixture
def store():
    """A folder of fsspec's store in memory, that goes with the test."""
    fs = fsspec.filesystem("memory")
    root = f"/{uuid.uuid4().hex}"
    fs.pipe({f"{root}/b.jsonl": line("2"), f"{root}/a/a.jsonl.gz": gzip.compress(line("1")), f"{root}/c.png": b"x"})
    fs.pipe({f"{root}/.hidden.jsonl": b"x"})
    yield fs, root
    fs.rm(root, recursive=True)


@pytest.fixture
def opened(tmp_path):
    class Opened:
        def __init__(self):
            self.messages = []

        def __call__(self, source, **options):
            self.messages.clear()
            config = DataConfig(source=source, **options)
            return open_source(config, cache=tmp_path / "cache", progress=self.messages.append)

    return Opened()


def test_a_folder_a_glob_and_a_file(store, opened, documents):
    _, root = store
    folder = opened(f"memory:/{root}")
    assert documents(folder.parts) == ["1", "2"]
    assert "2 files" in folder.describe()
    assert "(2 other files ignored)" in folder.describe()
    assert documents(opened(f"memory:/{root}/*/*.gz").parts) == ["1"]
    assert documents(opened(f"memory:/{root}/b.jsonl").parts) == ["2"]


def test_the_fingerprint_is_that_of_the_same_files_here(store, opened, tmp_path):
    fs, root = store
    (tmp_path / "here" / "a").mkdir(parents=True)
    for name in ("b.jsonl", "a/a.jsonl.gz"):
        (tmp_path / "here" / name).write_bytes(fs.cat(f"{root}/{name}"))
    assert opened(f"memory:/{root}").fingerprint == opened(str(tmp_path / "here")).fingerprint


def test_only_new_and_changed_files_are_fetched(store, opened, documents):
    fs, root = store
    before = opened(f"memory:/{root}").fingerprint
    assert opened.messages == ["fetching 2 new or changed remote files (0.0 MB)"]
    assert opened(f"memory:/{root}").fingerprint == before
    assert opened.messages == []
    fs.pipe(f"{root}/b.jsonl", line("3"))
    changed = opened(f"memory:/{root}")
    assert opened.messages == ["fetching 1 new or changed remote files (0.0 MB)"]
    assert changed.fingerprint != before
    assert documents(changed.parts) == ["1", "3"]


def test_a_copy_that_is_gone_is_fetched_again_if_it_is_still_the_same(store, opened, documents, tmp_path):
    fs, root = store
    source = opened(f"memory:/{root}/b.jsonl")
    (copy,) = (tmp_path / "cache" / "remote").iterdir()
    copy.unlink()
    assert documents(source.parts) == ["2"]
    assert copy.exists()
    copy.unlink()
    fs.pipe(f"{root}/b.jsonl", line("3"))
    with pytest.raises(DataError, match=r"b\.jsonl has changed since it was fingerprinted"):
        documents(source.parts)


def test_a_store_that_tells_nothing_of_changes_is_asked_for_the_content(store, opened, monkeypatch):
    fs, root = store
    monkeypatch.setattr("titan_data.remote._MARKERS", ())
    before = opened(f"memory:/{root}/b.jsonl").fingerprint
    fs.pipe(f"{root}/b.jsonl", line("3"))
    assert opened(f"memory:/{root}/b.jsonl").fingerprint != before


def test_a_file_that_arrives_short_is_refused_and_not_kept(store, opened, monkeypatch, tmp_path):
    fs, root = store
    monkeypatch.setattr(type(fs), "info", lambda self, path: {"name": path, "type": "file", "size": 99, "created": 1})
    with pytest.raises(DataError, match=r"b\.jsonl was cut short: 14 of 99 bytes"):
        opened(f"memory:/{root}/b.jsonl")
    assert not list((tmp_path / "cache").glob("files/*.json"))


def test_errors_name_the_url(store, opened, monkeypatch):
    _, root = store
    with pytest.raises(FileNotFoundError, match=r"memory:/.*/nothing\.jsonl does not exist"):
        opened(f"memory:/{root}/nothing.jsonl")
    with pytest.raises(FileNotFoundError, match=r"there is no corpus 'memory:/.*nothing': no file matches"):
        opened(f"memory:/{root}/*.nothing")
    with pytest.raises(DataError, match="cannot read unheard-of://x: ValueError: Protocol not known"):
        opened("unheard-of://x")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(known_stores, "s3", raising=False)  # another test may have used it before
    with pytest.raises(MissingPackageError, match=r"reading s3://bucket/x .*pip install 'titan-data\[s3\]'"):
        opened("s3://bucket/x")


# In processes of their own: the clients of HTTP and S3 keep threads, after which tests should not fork.
UNREACHABLE = """
import socket
from pathlib import Path
from titan_data.config import DataConfig
from titan_data.errors import DataError
from titan_data.sources import open_source
with socket.socket() as closed:
    closed.bind(("127.0.0.1", 0))
    host = "http://127.0.0.1:%d" % closed.getsockname()[1]
for name in ("a.jsonl", "*.jsonl"):
    try:
        open_source(DataConfig(source=f"{host}/{name}"), cache=Path("cache"), progress=print)
    except DataError as error:
        print(type(error).__name__, error)
"""


def test_a_host_that_cannot_be_reached_is_no_missing_file(tmp_path):
    run = subprocess.run([sys.executable, "-c", UNREACHABLE], cwd=tmp_path, capture_output=True, text=True, check=True)
    said = run.stdout.splitlines()
    assert len(said) == 2
    for line, name in zip(said, ("a.jsonl", "*.jsonl"), strict=True):
        assert line.startswith("DataError cannot read http://127.0.0.1:")
        assert f"/{name}: ClientConnectorError: Cannot connect to host" in line


S3_SERVER = """
import boto3, sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
client.create_bucket(Bucket="titan")
for number in range(3):
    client.put_object(Bucket="titan", Key=f"corpus/{number}.jsonl", Body=b'{"text": "%d"}' % number)
print(f"http://{host}:{port}", flush=True)
sys.stdin.read()
"""
S3_CLIENT = """
from pathlib import Path
from titan_data.config import DataConfig
from titan_data.errors import DataError
from titan_data.source import all_pieces
from titan_data.sources import open_source
for source in ("s3://titan/corpus/*.jsonl", "s3://titan/corpus", "s3://titan/corpus/1.jsonl", "s3://nowhere/x.jsonl"):
    messages = []
    try:
        found = open_source(DataConfig(source=source), cache=Path("cache"), progress=messages.append)
        print("".join(piece.text for piece in all_pieces(found)), len(messages))
    except DataError as error:
        print(error)
print(len(list(Path("cache/remote").iterdir())))
"""


def test_a_real_s3_server(tmp_path):
    env = os.environ | {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    server = subprocess.Popen(
        [sys.executable, "-c", S3_SERVER],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with server:
        env["AWS_ENDPOINT_URL"] = server.stdout.readline().decode().strip()
        client = subprocess.run(
            [sys.executable, "-c", S3_CLIENT], env=env, cwd=tmp_path, capture_output=True, text=True
        )
        server.stdin.close()
    glob, folder, file, missing, copies = client.stdout.splitlines()
    assert (glob, folder, file) == ("012 1", "012 1", "1 1")
    assert "s3://nowhere/x.jsonl" in missing
    assert copies == "3"
