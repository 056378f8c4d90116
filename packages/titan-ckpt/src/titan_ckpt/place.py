"""A folder, on a disk or in an object store: the one way in which this package reaches files.

`place_of` takes what a user types. A path leads to a `LocalPlace`; a URL that fsspec knows (`s3://bucket/run`,
`gs://…`, `hf://…`, `memory://…`) to a `RemotePlace`. Both are values: they hold a name and no connection, so that they
may be compared, copied, and used after a fork.

What a caller may rely on: a file that `create` has made has all its bytes, or isn't there (object stores), or was cut
by a crash (disks: only what was renamed afterwards counts). Listings are never taken from a cache.
"""

import abc
import contextlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

from titan_ckpt.errors import CheckpointError
from titan_ckpt.storage import FileRecord, HashingFile, LocalOutput

Location: TypeAlias = "str | os.PathLike[str] | Place"


def place_of(location: Location) -> "Place":
    """The folder that a path or URL names; a `Place` is returned as it is.

    Raises:
        CheckpointError: if a URL has lost a slash on its way through `pathlib`.
    """
    if isinstance(location, Place):
        return location
    text = os.fspath(location)
    if text.startswith("file://"):
        return LocalPlace(Path(text.removeprefix("file://")))
    if "://" in text:
        from titan_ckpt.remote_place import RemotePlace

        return RemotePlace(text.rstrip("/"))
    if isinstance(location, os.PathLike) and re.match(r"[a-z][a-z0-9+.-]+:/", text):
        raise CheckpointError(f"{text} was a URL before pathlib dropped a slash; give it as a string, not as a Path.")
    return LocalPlace(Path(text))


class Place(abc.ABC):
    """A folder, which need not exist; names of files in it are POSIX paths relative to it.

    Every method raises OSError when the system or the provider says no, and CheckpointError, with the remedy, when
    a package or credentials are missing or a bucket doesn't exist.
    """

    @property
    @abc.abstractmethod
    def path(self) -> Path | None:
        """Where it is on this machine's file systems; None if it is remote."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The last component."""

    @property
    @abc.abstractmethod
    def parent(self) -> "Place":
        """The folder that this one is in."""

    @abc.abstractmethod
    def __truediv__(self, name: str) -> "Place":
        """A folder below."""

    @abc.abstractmethod
    def exists(self) -> bool:
        """Whether something has this name: a folder (with a file in it, in an object store) or a file."""

    @abc.abstractmethod
    def files(self) -> dict[str, int]:
        """Every file below, at any depth, with its bytes; empty if nothing is there."""

    @abc.abstractmethod
    def folders(self) -> list[str]:
        """Names of the folders directly below, sorted; empty if nothing is there."""

    @abc.abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file; FileNotFoundError if there is none."""

    @abc.abstractmethod
    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """A file's content, or `size` bytes of it from `offset` on, fewer where it ends; FileNotFoundError."""

    @abc.abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A file for reading, seekable; FileNotFoundError."""

    @abc.abstractmethod
    def create(self, name: str, on_write: Callable[[int], object] = lambda size: None) -> HashingFile:
        """A new file, hashed while it is written, durable once closed; folders that it needs are made.

        On a disk an existing file is a FileExistsError; in an object store it is replaced when this one is closed.
        """

    def write(self, name: str, content: bytes) -> FileRecord:
        """Writes a whole new file and returns its record once it is durable."""
        with self.create(name) as file:
            file.write(content)
        return file.record

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Deletes a file; nothing happens if there is none."""

    @abc.abstractmethod
    def delete(self) -> None:
        """Deletes the folder with everything below; nothing happens if there is none."""


@dataclass(frozen=True)
class LocalPlace(Place):
    """A folder that the operating system knows."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.folder

    @property
    def name(self) -> str:
        """The last component."""
        return self.path.name

    @property
    def parent(self) -> "LocalPlace":
        """The folder that this one is in."""
        return LocalPlace(self.path.parent)

    def __truediv__(self, name: str) -> "LocalPlace":
        return LocalPlace(self.path / name)

    def exists(self) -> bool:
        """Whether a folder or file has this name."""
        return self.path.exists()

    def files(self) -> dict[str, int]:
        """Every file below with its bytes."""
        found = {}
        for folder, _, names in os.walk(self.folder, onerror=_raise_unless_gone):
            for path in (Path(folder, name) for name in names):
                with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                    found[path.relative_to(self.folder).as_posix()] = path.stat().st_size
        return dict(sorted(found.items()))

    def folders(self) -> list[str]:
        """Names of the folders directly below."""
        return sorted(path.name for path in self.path.iterdir() if path.is_dir()) if self.path.is_dir() else []

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return (self.path / name).stat().st_size

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """A file's content, or a part of it."""
        with (self.path / name).open("rb") as file:
            file.seek(offset)
            return file.read(-1 if size is None else size)

    def open(self, name: str) -> BinaryIO:
        """A file for reading."""
        return (self.path / name).open("rb")

    def create(self, name: str, on_write: Callable[[int], object] = lambda size: None) -> HashingFile:
        """A new file."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return HashingFile(LocalOutput(path), on_write)

    def remove(self, name: str) -> None:
        """Deletes a file."""
        (self.path / name).unlink(missing_ok=True)

    def delete(self) -> None:
        """Deletes the folder; of a link, the link and not what it leads to."""
        if self.path.is_symlink():
            self.path.unlink()
        elif self.path.exists():
            shutil.rmtree(self.path)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error
