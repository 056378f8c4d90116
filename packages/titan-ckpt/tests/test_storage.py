import errno
import fcntl
import hashlib
import os
import resource
import time
from pathlib import Path
from typing import IO, Any, cast

import pytest
import torch

from titan_ckpt import storage
from titan_ckpt.storage import HashingFile, LocalOutput, discard, publish, scratch


def folder_with(path: Path, content: str) -> Path:
    (path / "files").mkdir(parents=True)
    (path / "files" / "x").write_text(content)
    return path


def content_of(path: Path) -> str:
    return (path / "files" / "x").read_text()


def test_the_hash_is_of_the_bytes_in_the_order_written(tmp_path: Path) -> None:
    pieces = [b"head", bytes(range(256)) * 80_000, b"", torch.arange(3).numpy().data, b"tail"]
    seen: list[int] = []
    with HashingFile(LocalOutput(tmp_path / "x"), seen.append) as file:
        for piece in pieces:
            file.write(piece)
            assert file.tell() == sum(seen)
    content = (tmp_path / "x").read_bytes()
    assert content == b"".join(bytes(piece) for piece in pieces)
    assert file.record.size == len(content)
    assert file.record.sha256 == hashlib.sha256(content).hexdigest()


def test_the_callers_memory_is_hashed_before_the_call_returns(tmp_path: Path) -> None:
    class Slow:
        def __init__(self, inner: Any) -> None:
            self.inner, self.hexdigest = inner, inner.hexdigest

        def update(self, data: memoryview) -> None:
            time.sleep(0.05)
            self.inner.update(data)

    data = bytearray(b"a" * (1 << 20))
    with HashingFile(LocalOutput(tmp_path / "x")) as file:
        file._hash = Slow(file._hash)
        file.write(data)
        data[:] = b"b" * len(data)
    assert file.record.sha256 == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()


def test_all_bytes_are_synced_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with HashingFile(LocalOutput(tmp_path / "x")) as file:
        file.write(b"a" * 10_000_001)
        assert synced == []
    assert synced == [10_000_001]


def test_a_failed_sync_is_an_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    file = HashingFile(LocalOutput(tmp_path / "x"))
    file.write(b"a" * 10)
    with pytest.raises(OSError, match="Input/output") as raised:
        file.close()
    assert raised.value.filename == str(tmp_path / "x")


@pytest.mark.parametrize("size", [0, 1, 4096, storage._BUFFER_BYTES, storage._BUFFER_BYTES + 1])
def test_a_file_system_that_wants_other_blocks_gets_them_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    write, refused = os.write, []

    def picky(descriptor: int, data: memoryview) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", picky)
    content = os.urandom(size)
    with HashingFile(LocalOutput(tmp_path / "x")) as file:
        file.write(content)
    assert (tmp_path / "x").read_bytes() == content
    assert len(refused) <= 1


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no direct writing")
def test_the_page_cache_is_left_alone_where_the_file_system_allows(tmp_path: Path) -> None:
    output = LocalOutput(tmp_path / "x")
    if not output._direct:
        pytest.skip("this file system has no direct writing")
    flags = fcntl.fcntl(output._file, fcntl.F_GETFL)
    output.abandon()
    assert flags & os.O_DIRECT


def test_a_full_disk_is_seen_through_torchs_own_error(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised, HashingFile(LocalOutput(tmp_path / "x")) as file:
            # Torch's zip writer raises an error of its own over it.
            torch.save(torch.zeros(storage._BUFFER_BYTES), cast(IO[bytes], file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.filename == str(tmp_path / "x")


def test_an_existing_file_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    with pytest.raises(FileExistsError):
        LocalOutput(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"1"


def test_publishing_renames_and_syncs_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(storage, "sync_folder", lambda folder: synced.append(folder.name))
    temporary = folder_with(scratch(tmp_path / "final", "tmp"), "new")
    assert publish(temporary, tmp_path / "final") is None
    assert content_of(tmp_path / "final") == "new"
    assert synced == [temporary.name, "files", tmp_path.name]


def test_a_replaced_folder_is_left_whole_for_the_caller(tmp_path: Path) -> None:
    final = folder_with(tmp_path / "final", "before")
    replaced = publish(folder_with(scratch(final, "tmp"), "new"), final)
    assert replaced is not None
    assert (content_of(final), content_of(replaced)) == ("new", "before")
    discard(replaced)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_failed_publication_gives_the_replaced_folder_its_name_back(tmp_path: Path) -> None:
    final = folder_with(tmp_path / "final", "before")
    temporary = folder_with(scratch(final, "tmp"), "new")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self == temporary:
            raise PermissionError
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(PermissionError):
            publish(temporary, final)
    assert content_of(final) == "before"


def test_discarding_renames_before_it_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doomed = []
    monkeypatch.setattr(storage.shutil, "rmtree", lambda path: doomed.append(path.name))
    folder_with(tmp_path / "step-5", "x")
    discard(tmp_path / "step-5")
    assert not (tmp_path / "step-5").exists()
    assert doomed[0].startswith("step-5.del-")


def test_discarding_a_link_leaves_what_it_leads_to(tmp_path: Path) -> None:
    target = folder_with(tmp_path / "elsewhere", "kept")
    (tmp_path / "link").symlink_to(target)
    discard(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    assert content_of(target) == "kept"
