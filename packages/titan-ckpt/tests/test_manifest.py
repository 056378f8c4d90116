import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from titan_ckpt.errors import CheckpointError, DamagedCheckpointError
from titan_ckpt.manifest import MANIFEST_NAME, Manifest
from titan_ckpt.storage import FileRecord


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files and the manifest that lists them."""
    files = {"a.bin": b"a" * 1000, "files/b.txt": b"bb"}
    records = {}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        records[name] = FileRecord(len(content), hashlib.sha256(content).hexdigest())
    manifest = Manifest(
        step=7,
        world_size=2,
        state=("model",),
        per_rank=("rng",),
        meta={"tokens": 12, "nested": {"x": [1.5, None]}},
        versions={"torch": "2.13"},
        files=records,
    )
    (tmp_path / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return tmp_path


def test_a_manifest_reads_back_as_it_was_written(folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert manifest.step == 7
    assert manifest.meta == {"tokens": 12, "nested": {"x": [1.5, None]}}
    assert manifest.files["a.bin"].size == 1000
    assert manifest.to_bytes() == (folder / MANIFEST_NAME).read_bytes()
    assert manifest.damage(folder, hashes=True) == []


def test_every_kind_of_damage_is_named_with_its_file(folder: Path) -> None:
    manifest = Manifest.read(folder)
    (folder / "a.bin").write_bytes(b"a" * 999)
    (folder / "files/b.txt").unlink()
    assert manifest.damage(folder, hashes=False) == [
        "a.bin has 999 bytes instead of 1,000",
        "files/b.txt is missing",
    ]
    assert manifest.damage(folder, hashes=False, names=["files/b.txt"]) == ["files/b.txt is missing"]


def test_a_flipped_byte_is_seen_by_the_hash_alone(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"a" * 500 + b"b" + b"a" * 499)
    manifest = Manifest.read(folder)
    assert manifest.damage(folder, hashes=False) == []
    (problem,) = manifest.damage(folder, hashes=True)
    assert problem.startswith("a.bin has other bytes")


@pytest.mark.parametrize("change", ["missing", "truncated", "edited", "a list"])
def test_a_manifest_that_is_not_what_was_written_is_damage(folder: Path, change: str) -> None:
    path = folder / MANIFEST_NAME
    text = path.read_text()
    if change == "missing":
        path.unlink()
    else:
        path.write_text(
            {"truncated": text[:-20], "edited": text.replace('"step": 7', '"step": 8'), "a list": "[]"}[change]
        )
    with pytest.raises(DamagedCheckpointError, match=MANIFEST_NAME):
        Manifest.read(folder)


def test_a_later_format_asks_for_an_upgrade(folder: Path) -> None:
    body = json.loads((folder / MANIFEST_NAME).read_text()) | {"format_version": 99}
    body.pop("sha256")
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST_NAME).write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="Upgrade titan-ckpt"):
        Manifest.read(folder)


def test_progress_counts_every_byte_once(folder: Path) -> None:
    seen: list[int] = []
    Manifest.read(folder).damage(folder, hashes=True, progress=seen.append)
    assert sorted(seen) == [2, 1000]


def test_a_manifest_is_a_value(folder: Path) -> None:
    assert Manifest.read(folder) == Manifest.read(folder)
    assert dataclasses.replace(Manifest.read(folder), step=8) != Manifest.read(folder)
