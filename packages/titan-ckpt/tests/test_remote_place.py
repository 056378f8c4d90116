import os
import sys
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFile

from ranks import run_ranks
from titan_ckpt.errors import CheckpointError
from titan_ckpt.location import place_of
from titan_ckpt.place import Place


def write(place: Place, name: str, content: bytes) -> None:
    with place.create(name) as file:
        file.write(content)


def test_an_abandoned_file_never_appears_in_an_object_store(s3: str) -> None:
    place = place_of(s3)

    def write_some(size: int) -> None:
        with place.create("x") as file:
            file.write(bytes(size))
            raise ZeroDivisionError

    for size in (10, 60_000_000):  # the second has sent a part already
        with pytest.raises(ZeroDivisionError):
            write_some(size)
        assert place.files() == {}


def test_a_write_that_the_provider_refuses_is_seen_as_an_os_error(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class ProviderError(Exception):
        pass

    def refuse(self: object, data: object) -> int:
        raise ProviderError("quota")

    def write_through_a_library() -> None:
        with place_of(memory).create("x") as file:
            try:
                file.write(b"1")
            except OSError:
                raise RuntimeError("what a library in C++ makes of it") from None

    monkeypatch.setattr(MemoryFile, "write", refuse)
    with pytest.raises(OSError, match="ProviderError: quota"):
        write_through_a_library()


def test_another_process_sees_what_is_written(s3: str) -> None:
    place = place_of(s3)
    assert place.folders() == []

    def look_and_write() -> list[str]:
        write(place, f"folder-{os.environ['RANK']}/x", b"1")
        return place.folders()

    run_ranks(2, look_and_write)
    assert place.folders() == ["folder-0", "folder-1"]


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(CheckpointError, match=r"gs://bucket/run cannot be reached.*install titan-ckpt\[gs\]"):
        place_of("gs://bucket/run").exists()
    with pytest.raises(CheckpointError, match="check the URL"):
        place_of("s4://bucket/run").exists()


def test_a_missing_bucket_is_named(s3_server: str) -> None:
    place = place_of("s3://absent/run")
    for use in (
        place.files,
        place.folders,
        lambda: write(place, "x", b"1"),
        lambda: write(place, "x", bytes(60_000_000)),
    ):
        with pytest.raises(CheckpointError, match=r"s3://absent/run.* its bucket doesn't exist"):
            use()


def test_missing_credentials_say_what_to_set(s3_server: str, tmp_path: Path) -> None:
    def look() -> str:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            del os.environ[name]
        os.environ |= {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
        with pytest.raises(CheckpointError) as raised:
            place_of("s3://titan/run").files()
        return str(raised.value)

    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in run_ranks(1, look)[0]
