import hashlib
import os
from pathlib import Path

import pytest

from titan_ckpt.errors import CheckpointError
from titan_ckpt.local_place import LocalPlace
from titan_ckpt.location import place_of
from titan_ckpt.place import Place
from titan_ckpt.remote_place import RemotePlace


def write(place: Place, name: str, content: bytes) -> None:
    with place.create(name) as file:
        file.write(content)


def test_what_a_user_types_becomes_a_place() -> None:
    assert place_of("runs/a") == place_of(Path("runs/a")) == LocalPlace(Path("runs/a"))
    assert place_of("file:///runs/a").path == Path("/runs/a")
    assert place_of("s3://bucket/run/") == RemotePlace("s3://bucket/run")
    assert place_of(place_of("s3://bucket/run")) == RemotePlace("s3://bucket/run")
    with pytest.raises(CheckpointError, match="give it as a string"):
        place_of(Path("s3://bucket/run"))


@pytest.mark.parametrize("location", ["/runs/a", "s3://bucket/runs/a"])
def test_names_and_parents_need_no_connection(location: str) -> None:
    place = place_of(location)
    assert str(place) == location
    assert (place.name, place.parent.name) == ("a", "runs")
    assert place.parent / "a" == place
    assert str(place / "b") == f"{location}/b"
    assert (place.path is None) == ("://" in location)
    assert place_of("s3://bucket").parent == place_of("s3://bucket")


def test_files_come_back_as_they_were_written(anywhere: str) -> None:
    place = place_of(anywhere)
    content = os.urandom(3_000_000)
    seen: list[int] = []
    with place.create("deep/er/x", seen.append) as file:
        file.write(content[:5])
        file.write(content[5:])
    assert seen == [5, len(content) - 5]
    assert (file.record.size, file.record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    write(place, "empty", b"")
    assert place.files() == {"deep/er/x": len(content), "empty": 0}
    assert place.size("deep/er/x") == len(content)
    assert place.read("deep/er/x") == content
    assert place.read("empty") == b""
    assert place.read("deep/er/x", 1000, 10) == content[1000:1010]
    assert place.read("deep/er/x", 2_999_990, 100) == content[-10:]
    assert place.read("deep/er/x", 2_999_990) == content[-10:]
    with place.open("deep/er/x") as file:
        assert file.read(5) == content[:5]
        assert file.seek(-7, os.SEEK_END) == file.tell() == len(content) - 7
        assert file.read() == content[-7:]
        file.seek(0)
        assert file.read() == content


def test_folders_are_listed_as_they_are_now(anywhere: str) -> None:
    place = place_of(anywhere)
    assert (place.exists(), place.files(), place.folders()) == (False, {}, [])
    write(place, "a/x", b"1")
    write(place, "b/c/x", b"22")
    write(place, "file", b"333")
    write(place.parent, f"{place.name}-not/x", b"4")
    assert place.exists()
    assert (place / "file").exists()
    assert not (place / "fil").exists()
    assert place.folders() == ["a", "b"]
    assert place.files() == {"a/x": 1, "b/c/x": 2, "file": 3}
    (place / "b").delete()
    place.remove("file")
    place.remove("file")
    assert place.folders() == ["a"]
    assert place.files() == {"a/x": 1}
    place.delete()
    place.delete()
    assert not place.exists()
    (place.parent / f"{place.name}-not").delete()


def test_what_is_not_there_is_a_file_not_found(anywhere: str) -> None:
    place = place_of(anywhere)
    write(place, "folder/x", b"1")
    for use in (place.read, place.size, place.open, lambda name: place.read(name, 5, 5)):
        with pytest.raises(FileNotFoundError):
            use("absent")
    with pytest.raises((FileNotFoundError, IsADirectoryError)):
        place.read("folder")
