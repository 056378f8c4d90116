"""A folder that the operating system knows."""

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from titan_ckpt.place import Place
from titan_ckpt.storage import HashingFile, LocalOutput


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
