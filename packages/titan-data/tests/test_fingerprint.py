import hashlib
import os

import pytest

from titan_data.errors import DataError
from titan_data.fingerprint import hash_files

LONG_AGO = 1_600_000_000 * 10**9


class Hashing:
    """A folder of files, and how many of them each call had to read."""

    def __init__(self, folder):
        self.folder, self.memory = folder, folder / "memory" / "files.json"
        self.read = None

    def write(self, name, content, mtime_ns=LONG_AGO):
        path = self.folder / name
        path.write_text(content)
        os.utime(path, ns=(mtime_ns, mtime_ns))
        return path

    def __call__(self, *paths):
        messages = []
        hashes = hash_files(paths, self.memory, progress=messages.append)
        self.read = sum(int(message.split()[1]) for message in messages)
        return [file.sha256 for file in hashes]


@pytest.fixture
def hashing(tmp_path):
    return Hashing(tmp_path)


def digests(*texts):
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]


def test_an_unchanged_file_is_read_once(hashing):
    a, b = hashing.write("a", "one"), hashing.write("b", "two")
    assert hashing(a, b) == digests("one", "two")
    assert hashing.read == 2
    assert hashing(b, a) == digests("two", "one")
    assert hashing.read == 0


def test_only_changed_and_new_files_are_read_again(hashing):
    a, b = hashing.write("a", "one"), hashing.write("b", "two")
    hashing(a, b)
    hashing.write("b", "TWO", LONG_AGO + 1)
    c = hashing.write("c", "three")
    assert hashing(a, b, c) == digests("one", "TWO", "three")
    assert hashing.read == 2
    hashing.write("a", "longer", LONG_AGO)
    assert hashing(a, b, c) == digests("longer", "TWO", "three")
    assert hashing.read == 1


def test_a_file_that_has_just_been_written_is_not_trusted_to_stay(hashing):
    a = hashing.folder / "a"
    a.write_text("one")
    now = a.stat().st_mtime_ns
    hashing(a)
    hashing.write("a", "two", now)  # within the same tick of the clock
    assert hashing(a) == digests("two")


def test_a_spoilt_memory_is_made_anew(hashing):
    a = hashing.write("a", "one")
    for content in ("{", "[]", '{"x": 5}', "\udcff".encode("utf-8", "surrogateescape")):
        hashing.memory.parent.mkdir(exist_ok=True)
        hashing.memory.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert hashing(a) == digests("one")
        assert hashing.read == 1
        assert hashing(a) == digests("one")
        assert hashing.read == 0


def test_forgets_files_that_are_gone(hashing):
    a, b = hashing.write("a", "one"), hashing.write("b", "two")
    hashing(a, b)
    c = hashing.write("c", "three")
    hashing(a, c)
    assert str(b) not in hashing.memory.read_text()


def test_a_file_that_has_gone_is_named(hashing):
    a = hashing.write("a", "one")
    hashing(a)
    a.unlink()
    with pytest.raises(DataError, match=r"cannot read .*/a: No such file"):
        hashing(a)


def test_a_file_that_cannot_be_read_is_named(hashing):
    folder = hashing.folder / "a-folder"
    folder.mkdir()
    with pytest.raises(DataError, match=r"cannot read .*a-folder"):
        hashing(folder)


def test_a_cache_that_cannot_be_written_is_named(hashing):
    a = hashing.write("a", "one")
    (hashing.folder / "memory").write_text("a file where the cache should be")
    with pytest.raises(DataError, match=r"cannot write the cache .*TITAN_CACHE"):
        hashing(a)
