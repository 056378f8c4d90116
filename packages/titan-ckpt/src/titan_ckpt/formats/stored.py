"""The bytes of one file: mapped into memory if it is on a disk, else fetched range by range.

Pages of a mapped file belong to the system's cache and can be taken back at any time, so they are no memory of ours.
"""

import io
import math
import mmap
from typing import Any

import torch
from torch import Tensor

from titan_ckpt.errors import CheckpointError
from titan_ckpt.formats.lazy import LazyTensor
from titan_ckpt.place import Place


class StoredFile:
    """One file of a place, opened when it is first read."""

    def __init__(self, place: Place, name: str) -> None:
        self.place, self.name = place, name
        self.size = place.size(name)
        self._mapped: mmap.mmap | None = None

    def read(self, offset: int, size: int) -> Any:
        """`size` bytes from `offset` on, as a writable buffer that does not write to the file.

        Raises:
            OSError: if the file is shorter than that.
        """
        if offset + size > self.size:
            raise OSError(f"{self.name} has {self.size:,} bytes, and {offset + size:,} are needed")
        if size == 0:
            return bytearray()  # an empty file cannot be mapped
        if self.place.path is None:
            return bytearray(self.place.read(self.name, offset, size))
        return memoryview(self._map())[offset : offset + size]

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> LazyTensor:
        """The dense tensor whose bytes begin at `offset`."""
        row_shape = shape[1:]
        row_bytes = dtype.itemsize * math.prod(row_shape)

        def read(start: int, stop: int) -> Tensor:
            count = stop - start if shape else 1
            wanted = (count, *row_shape) if shape else ()
            begin, size = offset + start * row_bytes, count * row_bytes
            if size == 0:
                return torch.empty(wanted, dtype=dtype)
            try:
                data = torch.frombuffer(self.read(begin, size), dtype=torch.uint8)
            except OSError as error:  # not to be taken for one of the file that is being written
                raise CheckpointError(f"{self.place}/{self.name} could not be read: {error}.") from error
            if data.data_ptr() % dtype.itemsize:
                data = data.clone()  # operators may assume aligned numbers
            return data.view(dtype).view(wanted)

        return LazyTensor(dtype, shape, (self.name,), read)

    def open(self, offset: int = 0, size: int | None = None) -> io.RawIOBase:
        """A range of the file as a file of its own; small reads far apart cost a request each if it is remote."""
        return _Range(self, offset, self.size - offset if size is None else size)

    def _map(self) -> mmap.mmap:
        if self._mapped is None:
            with self.place.open(self.name) as file:
                # Private: torch wants memory that could be written to, and what is never written stays the file's.
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._mapped


class _Range(io.RawIOBase):
    """A part of a stored file, for readers that want a file."""

    def __init__(self, file: StoredFile, offset: int, size: int) -> None:
        super().__init__()
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        size = max(min(len(buffer), self._size - self._at), 0)
        buffer[:size] = self._file.read(self._offset + self._at, size)
        self._at += size
        return size

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if at < 0:
            raise OSError(f"{self._file.name}: there is nothing before its beginning")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at
