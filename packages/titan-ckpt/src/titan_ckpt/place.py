"""A folder, on a disk or in an object store: the one way in which this package reaches files.

Two kinds: `LocalPlace` and `RemotePlace`; `titan_ckpt.location` makes the right one of what a user types. Both are
values: they hold a name and no connection, so that they may be compared, copied, and used after a fork.

What a caller may rely on: a file that `create` has made has all its bytes, or isn't there (object stores), or was cut
by a crash (disks: only what was renamed afterwards counts). Listings are never taken from a cache.
"""

import abc
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from titan_ckpt.storage import FileRecord, HashingFile


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
