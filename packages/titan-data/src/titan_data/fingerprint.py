"""What files contain, as hashes that are remembered by each file's size and time of change."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from titan_data.cache import Progress, exclusive, writing_to
from titan_data.errors import DataError

# A file changed twice within the resolution of its time stamp looks unchanged; git calls this "racily clean". Hashes
# of files that young are not remembered. Two seconds is the coarsest resolution of any common file system.
_SETTLED_NS = 2_000_000_000


class FileHash(NamedTuple):
    """A file's content, and how to tell at a glance whether it is still the same."""

    size_bytes: int
    mtime_ns: int
    sha256: str

    def still_describes(self, path: Path) -> bool:
        """Returns whether the file is there, and has kept its size and time of change."""
        try:
            status = path.stat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (self.size_bytes, self.mtime_ns)


@dataclass(frozen=True)
class LocalContent:
    """A file on this machine, as it was when it was hashed; the `Content` of a `SourceFile`."""

    path: Path
    hash: FileHash

    @property
    def size_bytes(self) -> int:
        """Its size."""
        return self.hash.size_bytes

    @property
    def sha256(self) -> str:
        """Its hash, in hexadecimal."""
        return self.hash.sha256

    def local(self) -> Path:
        """Returns where it is."""
        return self.path

    def check_unchanged(self) -> None:
        """Raises DataError if it has changed since it was hashed."""
        if not self.hash.still_describes(self.path):
            raise DataError(
                f"{self.path} changed while it was being read. Start again when nothing writes to the corpus."
            )


def hash_files(paths: Sequence[Path], memory: Path, *, progress: Progress) -> list[FileHash]:
    """Returns the hash of each file, reading only those that changed since they were last hashed.

    Args:
        paths: absolute paths.
        memory: the JSON file that keeps hashes from one start to the next.
        progress: is told when there is something to read.

    Raises:
        DataError: for a file that cannot be read, or if `memory` cannot be written.
    """
    known = _load(memory)
    if not all(_is_current(path, known) for path in paths):
        with writing_to(memory), exclusive(memory, what="content fingerprint", progress=progress):
            known = _load(memory)  # another process may just have done it
            changed = [path for path in paths if not _is_current(path, known)]
            if changed:
                progress(f"reading {len(changed)} new or changed files to fingerprint their content")
                known.update((str(path), _hash(path)) for path in changed)
                _save(memory, {str(path): known[str(path)] for path in paths})
    return [known[str(path)] for path in paths]


def _is_current(path: Path, known: dict[str, FileHash]) -> bool:
    return str(path) in known and known[str(path)].still_describes(path)


def _hash(path: Path) -> FileHash:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            return FileHash(status.st_size, status.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Check its permissions.") from error


def _load(memory: Path) -> dict[str, FileHash]:
    # Whatever is wrong with it, it is only a memory: the files are still there to be read.
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        return {path: FileHash(*entry) for path, entry in json.loads(memory.read_bytes()).items()}
    return {}


def _save(memory: Path, known: dict[str, FileHash]) -> None:
    newest = time.time_ns() - _SETTLED_NS
    settled = {path: entry for path, entry in known.items() if entry.mtime_ns < newest}
    scratch = memory.with_name(f"{memory.name}.partial")
    scratch.write_text(json.dumps(settled))
    scratch.replace(memory)
