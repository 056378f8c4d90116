import errno
import gzip
import sys

import pytest
import zstandard

from titan_data.errors import DataError, MissingPackageError
from titan_data.source_file import compression, kind

TEXT = ("Whose woods these are I think I know.\n" * 3000).encode()
ZSTD = zstandard.ZstdCompressor(write_checksum=True)
PACKED = {
    "a.txt": TEXT,
    "a.txt.gz": gzip.compress(TEXT[:50_000]) + gzip.compress(TEXT[50_000:]),
    "a.txt.zst": ZSTD.compress(TEXT[:50_000]) + ZSTD.compress(TEXT[50_000:]),
}


@pytest.fixture
def written(tmp_path, source_file):
    def written(name, content):
        (tmp_path / name).write_bytes(content)
        return source_file(tmp_path / name)

    return written


@pytest.mark.parametrize("name", PACKED)
def test_is_read_unpacked_in_all_its_frames(written, name):
    with written(name, PACKED[name]).open() as file:
        assert file.read() == TEXT
    with written(name, PACKED[name]).open() as file:
        lines = list(file)
    assert len(lines) == 3000
    assert set(lines) == {TEXT[:38]}


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "no header", "empty"])
def test_a_file_that_is_not_whole_is_refused(written, name, damage):
    content = bytearray(PACKED[name])
    if damage == "cut":
        content = content[:-3]
    elif damage == "flipped":
        content[len(content) // 4] ^= 0xFF
    else:
        content = bytearray(b"not packed at all" if damage == "no header" else b"")
    with (
        pytest.raises(DataError, match=rf"{name} is not a whole \.(gz|zst) file"),
        written(name, content).open() as file,
    ):
        file.read()


def test_a_change_while_it_is_open_is_noticed(written, tmp_path):
    opened = written("a.txt", TEXT).open()
    opened.__enter__()
    (tmp_path / "a.txt").write_bytes(TEXT + b"!")
    with pytest.raises(DataError, match="changed while it was being read"):
        opened.__exit__(None, None, None)


def test_a_failing_disk_is_named_as_the_files(written):
    with pytest.raises(DataError, match=r"cannot read .*a\.txt: Input/output error"), written("a.txt", TEXT).open():
        raise OSError(errno.EIO, "Input/output error")


def test_without_its_package_the_extra_is_named(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingPackageError, match=r"titan-data\[zstd\]"), written("a.zst", b"packed").open() as file:
        file.read()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", (".jsonl", "")),
        ("s3://bucket/A.JSONL.GZ", (".jsonl", ".gz")),
        ("a.json.zst", (".json", ".zst")),
        ("a.gz", ("", ".gz")),
        ("README", ("", "")),
    ],
)
def test_names_tell_what_is_inside(name, expected):
    assert (kind(name), compression(name)) == expected
