"""Folders that are computed once and shared: by the ranks of a job, by jobs, by restarts.

A folder is built under another name and renamed when it is whole, so what stands under its own name was finished.
A lock lets one process build while the others wait; it is the kernel's, so a killed builder leaves none behind.
Assumes a file system where `rename` is atomic and `flock` works between the machines that share it.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeVar

from titan_data.errors import DataError

Progress = Callable[[str], None]
T = TypeVar("T")

_CANNOT_WRITE = {errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS}


class DamagedError(Exception):
    """A cached folder is there, but is not what its builder wrote."""


def cache_directory(configured: str | None) -> Path:
    """Returns the folder that holds everything cached: as configured, else by environment, else in the home."""
    if configured is not None:
        return Path(configured).expanduser()
    if path := os.environ.get("TITAN_CACHE"):
        return Path(path).expanduser()
    if path := os.environ.get("XDG_CACHE_HOME"):
        return Path(path).expanduser() / "titan"
    return Path.home() / ".cache" / "titan"


def find_or_build(
    folder: Path,
    *,
    open_folder: Callable[[Path], T],
    build: Callable[[Path], None],
    what: str,
    progress: Progress,
    resume: bool = False,
) -> T:
    """Opens a cached folder, which exactly one process builds first if it is missing or damaged.

    Args:
        folder: where it stands, or will.
        open_folder: reads it; raises FileNotFoundError if it is not there and `DamagedError` if it is spoilt.
        build: writes its content into a folder, which is empty but for what `resume` leaves in it.
        what: its name in messages, e.g. "token cache".
        progress: is told about waiting and rebuilding.
        resume: leave to `build` what a killed or interrupted build has written; a failed one's goes all the same.

    Raises:
        DataError: if the cache cannot be written (permissions, a full disk).
    """
    with contextlib.suppress(FileNotFoundError, DamagedError):
        return open_folder(folder)
    with writing_to(folder), exclusive(folder, what=what, progress=progress):
        try:
            return open_folder(folder)
        except FileNotFoundError:
            pass
        except DamagedError as damage:
            progress(f"the {what} {folder} is damaged ({damage}); building it again")
        # What a killed builder left behind goes first; holding the lock, nobody else is at work here.
        scratch = folder.with_name(f"{folder.name}.partial")
        if not resume:
            shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(exist_ok=True)
        try:
            build(scratch)
            shutil.rmtree(folder, ignore_errors=True)
            scratch.rename(folder)
        except BaseException as error:
            if isinstance(error, Exception) or not resume:
                shutil.rmtree(scratch, ignore_errors=True)
            raise
        return open_folder(folder)


@contextlib.contextmanager
def exclusive(path: Path, *, what: str, progress: Progress) -> Generator[None]:
    """Holds the lock that goes with `path`, saying so if another process has it."""
    from filelock import FileLock, Timeout  # imports asyncio; a warm start needs no lock

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(f"waiting for another process that prepares the {what}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def writing_to(path: Path) -> Generator[None]:
    """Turns the errors of a cache that cannot be written into one that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise DataError(
            f"cannot write the cache {path}: {error}. Free some space there, or name another folder with "
            "data.cache_dir or the environment variable TITAN_CACHE."
        ) from error
