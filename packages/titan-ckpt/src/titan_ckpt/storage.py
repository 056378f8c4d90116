"""Files that are hashed while they are written, and folders that appear whole or not at all.

Assumes a POSIX file system: `rename` within a folder is atomic, and a renamed folder survives a power cut once
its parent has been synced.

A folder is written under a *scratch* name beside its final one, `<final>.tmp-<8 hex digits>`, and renamed when
it is complete. Two more scratch names exist for an instant: `.old-…` is a whole folder that is being replaced
(a folder cannot be renamed over another in one step), `.del-…` is one that is being deleted.
"""

import hashlib
import io
import os
import re
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from titan_ckpt.manifest import FileRecord

_HEX = "[0-9a-f]{8}"
SCRATCH_PATTERN = rf"\.(?P<purpose>tmp|old|del)-{_HEX}"

_HASH_ASIDE_BYTES = 1 << 20  # below this, handing the bytes to another thread costs more than hashing them
_SYNC_EVERY_BYTES = 1 << 26  # large enough for a disk to reach its speed, small beside a checkpoint


class HashingFile(io.RawIOBase):
    """A new file that takes the SHA-256 of the bytes it is given and is on the disk once it is closed.

    Large writes are hashed in a second thread while they are written, and a third sends to the disk what has been
    written so far, so that little is left to wait for at the end. Used as a context manager it closes the file,
    or abandons it if the block raises; if a write had failed, that is the error that is seen, whatever the code
    in between has made of it.
    """

    def __init__(self, path: Path, on_write: Callable[[int], object] = lambda size: None) -> None:
        super().__init__()
        self.on_write = on_write
        """Called after each write with its bytes."""
        self._file = path.open("xb", buffering=0)
        self._hash = hashlib.sha256()
        self._threads = ThreadPoolExecutor(2)
        self._syncing: Future[None] | None = None
        self._sync_at = _SYNC_EVERY_BYTES
        self._size = 0
        self._failure: OSError | None = None

    @property
    def record(self) -> FileRecord:
        """Size and hash of what has been written."""
        return FileRecord(self._size, self._hash.hexdigest())

    def write(self, data: Any, /) -> int:
        """Writes all the bytes (a raw file may write fewer; callers in C++ don't look) and hashes them."""
        view = memoryview(data).cast("B")
        if view.nbytes < _HASH_ASIDE_BYTES:
            self._hash.update(view)
            self._write(view)
        else:
            hashing = self._threads.submit(self._hash.update, view)
            try:
                self._write(view)
            finally:
                hashing.result()  # the memory may be the caller's only until we return
        self.on_write(view.nbytes)
        return view.nbytes

    def _write(self, view: memoryview) -> None:
        try:
            while view:
                written = self._file.write(view)
                self._size += written
                view = view[written:]
            if self._size >= self._sync_at and (self._syncing is None or self._syncing.done()):
                self._sync_at = self._size + _SYNC_EVERY_BYTES
                self._wait_for_sync()
                self._syncing = self._threads.submit(os.fsync, self._file.fileno())
        except OSError as error:
            error.filename = error.filename or self._file.name
            self._failure = error
            raise

    def _wait_for_sync(self) -> None:
        """Sees the errors of the last sync too: the system tells each of them only once."""
        if self._syncing is not None:
            self._syncing.result()

    def tell(self) -> int:
        """Bytes written."""
        return self._size

    def writable(self) -> bool:
        """Always."""
        return True

    def close(self) -> None:
        """Waits until the bytes are on the disk; closing twice is harmless."""
        if not self.closed:
            try:
                self._wait_for_sync()
                os.fsync(self._file.fileno())
            finally:
                self._release()

    def _release(self) -> None:
        self._threads.shutdown()
        self._file.close()
        super().close()

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        if exc_val is None:
            self.close()
            return
        if not self.closed:
            self._release()
        if self._failure is not None and exc_val is not self._failure:
            raise self._failure


def write_file(path: Path, content: bytes) -> FileRecord:
    """Writes a new file, making the folders it needs, and returns its record once it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with HashingFile(path) as file:
        file.write(content)
    return file.record


def scratch(final: Path, purpose: Literal["tmp", "old", "del"]) -> Path:
    """An unused name beside `final`, which `SCRATCH_PATTERN` recognises."""
    return final.with_name(f"{final.name}.{purpose}-{secrets.token_hex(4)}")


def publish(temporary: Path, final: Path) -> Path | None:
    """Makes a complete folder appear under its final name, durably.

    Killed at any point, there is a whole folder: the new one, or the replaced one under its own or its `.old-`
    name.

    Returns:
        The folder that had the final name, under its `.old-` name, for the caller to discard; None if none had.
    """
    for folder in [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]:
        sync_folder(folder)
    if not final.exists():
        temporary.rename(final)
        sync_folder(final.parent)
        return None
    replaced = scratch(final, "old")
    final.rename(replaced)
    try:
        temporary.rename(final)
    except OSError:
        replaced.rename(final)
        raise
    sync_folder(final.parent)
    return replaced


def discard(folder: Path) -> None:
    """Deletes a folder; killed at any point, what is left doesn't look like a checkpoint.

    Of a link, the link is deleted and not what it leads to.
    """
    doomed = folder if re.search(rf"\.del-{_HEX}$", folder.name) else folder.rename(scratch(folder, "del"))
    if doomed.is_symlink():
        doomed.unlink()
    else:
        shutil.rmtree(doomed)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
