"""Files that are hashed while they are written, and folders that appear whole or not at all.

Assumes a POSIX file system: `rename` within a folder is atomic, and a renamed folder survives a power cut once
its parent has been synced.

A folder is written under a *scratch* name beside its final one, `<final>.tmp-<8 hex digits>`, and renamed when
it is complete. Two more scratch names exist for an instant: `.old-…` is a whole folder that is being replaced
(a folder cannot be renamed over another in one step), `.del-…` is one that is being deleted.
"""

import errno
import fcntl
import hashlib
import io
import mmap
import os
import re
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

_HEX = "[0-9a-f]{8}"
SCRATCH_PATTERN = rf"\.(?P<purpose>tmp|old|del)-{_HEX}"

_HASH_ASIDE_BYTES = 1 << 20  # below this, handing the bytes to another thread costs more than hashing them
_BUFFER_BYTES = 1 << 23  # large enough for a disk to reach its speed, small enough to stay in a cache


@dataclass(frozen=True)
class FileRecord:
    """What is known of one file."""

    size: int
    """Bytes."""

    sha256: str
    """Hexadecimal digest, taken while the bytes were written."""


class Output(Protocol):
    """Where the bytes of a new file go."""

    name: str

    def write(self, view: memoryview, /) -> int:
        """Takes some of the bytes, not necessarily all, and returns how many."""
        ...

    def finish(self) -> None:
        """Returns when the file is there and would survive a power cut."""
        ...

    def abandon(self) -> None:
        """Gives up; nobody will want what has been written."""
        ...


class HashingFile(io.RawIOBase):
    """A new file that takes the SHA-256 of the bytes it is given; made by `Place.create`.

    Large writes are hashed in a second thread while they are written. Used as a context manager it closes the file,
    or abandons it if the block raises; if a write had failed, that is the error that is seen, whatever the code in
    between has made of it.
    """

    def __init__(self, output: Output, on_write: Callable[[int], object] = lambda size: None) -> None:
        super().__init__()
        self.on_write = on_write
        """Called after each write with its bytes."""
        self._output = output
        self._hash = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)
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
            hashing = self._hasher.submit(self._hash.update, view)
            try:
                self._write(view)
            finally:
                hashing.result()  # the memory may be the caller's only until we return
        self.on_write(view.nbytes)
        return view.nbytes

    def _write(self, view: memoryview) -> None:
        try:
            while view:
                written = self._output.write(view)
                self._size += written
                view = view[written:]
        except OSError as error:
            self._failure = self._named(error)
            raise

    def _named(self, error: OSError) -> OSError:
        """Of the errors that a write or a sync raises the system doesn't say to which file it belongs."""
        if error.errno is not None and error.filename is None:
            error.filename = self._output.name
        return error

    def tell(self) -> int:
        """Bytes written."""
        return self._size

    def writable(self) -> bool:
        """Always."""
        return True

    def close(self) -> None:
        """Waits until the file is durable; closing twice is harmless."""
        if not self.closed:
            try:
                self._output.finish()
            except OSError as error:
                self._named(error)
                raise
            finally:
                self._release()

    def _release(self) -> None:
        self._hasher.shutdown()
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
            self._output.abandon()
            self._release()
        if self._failure is not None and exc_val is not self._failure:
            raise self._failure


class LocalOutput:
    """A new file on a disk, written around the page cache where the file system allows that.

    So a checkpoint does not push out what the run reads, costs no copy into new pages, and leaves nothing to wait
    for at the end. It takes blocks that are aligned in memory and in the file: bytes are collected in a buffer.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._direct = self._set_direct(True)
        self._buffer = mmap.mmap(-1, _BUFFER_BYTES)  # aligned to pages
        self._view = memoryview(self._buffer)
        self._filled = 0

    def _set_direct(self, wanted: bool) -> bool:
        """Asks the file system; returns what it does now."""
        flag = getattr(os, "O_DIRECT", 0)  # Linux has it
        others = fcntl.fcntl(self._file, fcntl.F_GETFL) & ~flag
        try:
            fcntl.fcntl(self._file, fcntl.F_SETFL, others | flag if wanted else others)
        except OSError:
            return False
        return wanted and flag != 0

    def write(self, view: memoryview, /) -> int:
        """Takes some of the bytes."""
        taken = min(len(view), _BUFFER_BYTES - self._filled)
        self._view[self._filled : self._filled + taken] = view[:taken]
        self._filled += taken
        if self._filled == _BUFFER_BYTES:
            self._flush()
        return taken

    def _flush(self) -> None:
        done = 0
        while done < self._filled:
            try:
                done += os.write(self._file, self._view[done : self._filled])
            except OSError as error:
                # Larger blocks than ours are asked for, or the last write was cut where it isn't aligned.
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = self._set_direct(False)
        self._filled = 0

    def finish(self) -> None:
        """Waits until all bytes are on the disk."""
        try:
            if self._direct:
                self._direct = self._set_direct(False)  # the rest is no whole number of blocks
            self._flush()
            os.fsync(self._file)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Leaves the file as it is."""
        self._view.release()
        self._buffer.close()
        os.close(self._file)


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
