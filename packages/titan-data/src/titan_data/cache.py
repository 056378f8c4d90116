"""Folders that are computed once and shared: by the ranks of a job, by jobs, by restarts.

A folder is built under another name and renamed when it is whole, so what stands under its own name was finished.
A lock lets one process build while the others wait; it is the kernel's, so a killed builder leaves none behind.
Assumes a file system where `rename` is atomic and `flock` works between the machines that share it.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeVar

from titan_data.errors import DataError

Progress = Callable[[str], None]
T = TypeVar("T")


class DamagedError(Exception):
    """A cached folder is there, but is not what its builder wrote."""


def cache_directory(configured: str | None) -> Path:
    """Returns the folder that holds everything cached: as configured, else by environment, else in the home.

    Raises:
        DataError: if an empty name is configured, which would be the folder that the program happens to run in.
    """
    if configured == "":
        raise DataError("data.cache_dir is empty; name a folder, or leave it out.")
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
        DataError: if the cache cannot be read or written (permissions, a full disk).
    """
    with writing_to(folder), contextlib.suppress(FileNotFoundError, DamagedError):
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
def writing_to(
    path: Path,
    *,
    what: str = "the cache",
    remedy: str = "name another folder with data.cache_dir or the environment variable TITAN_CACHE",
) -> Generator[None]:
    """Turns the system's errors while something is written into one that says what to do.

    What is read meanwhile has to report its own errors as `DataError`, which sources do.

    Args:
        path: where it goes, for messages that the system gives without a file.
        what: what it is.
        remedy: what to do besides making room.
    """
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        file, reason = error.filename or path, error.strerror or error
        raise DataError(
            f"cannot write {what} {file}: {reason}. Make room or change permissions there, or {remedy}."
        ) from error
