"""How fast a folder takes a checkpoint and gives it back."""

import fcntl
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 8 * 2**20
_F_NOCACHE = 48  # of <sys/fcntl.h> on macOS; Python has no name for it


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes a second."""

    write: float
    """From the first byte until the disk has all of them (fsync)."""
    read: float
    """With the page cache emptied of the file beforehand, where the file system can do that."""


def disk_speed(folder: Path, num_bytes: int) -> DiskSpeed:
    """Writes a file of `num_bytes` random bytes into `folder`, reads it, and removes it.

    Raises:
        OSError: if the folder isn't there, can't be written, or is full.
    """
    chunk = os.urandom(min(_CHUNK, num_bytes))  # random, as some disks compress
    with tempfile.TemporaryFile(dir=folder, prefix=".probe-", buffering=0) as file:
        started = time.perf_counter()
        for done in range(0, num_bytes, len(chunk)):
            file.write(chunk[: num_bytes - done])
        os.fsync(file.fileno())
        written = time.perf_counter() - started
        _leave_page_cache(file.fileno())
        file.seek(0)
        buffer = bytearray(len(chunk))
        started = time.perf_counter()
        while file.readinto(buffer):
            pass
        seen = time.perf_counter() - started
    return DiskSpeed(num_bytes / written, num_bytes / seen)


def _leave_page_cache(file: int) -> None:
    if sys.platform == "darwin":
        fcntl.fcntl(file, _F_NOCACHE, 1)
    else:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)  # drops what is on the disk, as all of it is by now
