"""Pieces of tensors into files, and new files on a disk that the system writes back when it likes.

What a conversion writes can be written again, and its hashes are checked when it is used: like `cp`, it does not wait
for the disk, which would halve its speed.
"""

import contextlib
import ctypes
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from titan_ckpt.formats.lazy import LazyTensor
from titan_ckpt.place import Place
from titan_ckpt.storage import HashingFile

_WRITE_BYTES = 1 << 23  # small enough to be in a cache still when it has been written and is hashed


def write_rows(file: HashingFile, tensor: LazyTensor) -> None:
    """Appends the bytes of a tensor, piece by piece."""
    for start, stop in tensor.pieces(_WRITE_BYTES):
        piece = tensor.read(start, stop).contiguous()
        file.write(byte_view(piece))


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, in place: valid as long as the tensor is."""
    if tensor.nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


@contextlib.contextmanager
def without_checksums() -> Iterator[None]:
    """Saves `torch.save` the CRC-32 of each tensor, which no reader looks at; the file's SHA-256 says more."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # of this thread
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def file_hash(place: Place, name: str, algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file's bytes, read anew."""
    with place.open(name) as file:
        return hashlib.file_digest(cast("Any", file), algorithm).hexdigest()


def create(place: Place, name: str) -> HashingFile:
    """A new file that is hashed while it is written; on a disk it is not waited for."""
    if place.path is None:
        return place.create(name)
    path = place.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return HashingFile(_PlainOutput(path))


class _PlainOutput:
    """A new file on a disk."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._file = path.open("wb", buffering=0)

    def write(self, view: memoryview, /) -> int:
        """Takes some of the bytes."""
        return self._file.write(view)

    def finish(self) -> None:
        """Gives the file to the system."""
        self._file.close()

    def abandon(self) -> None:
        """Leaves the file as it is."""
        self._file.close()
