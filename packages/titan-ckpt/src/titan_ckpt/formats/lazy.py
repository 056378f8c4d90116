"""Tensors that are read a few rows at a time, and what can be done to them before anything is read.

A format gives its tensors as a mapping name -> `LazyTensor`; a key map turns one such mapping into another; a writer
takes the rows as it writes them. So the memory of a conversion is that of one piece, whatever the size of the model.
Rows are counted along the first dimension; a tensor without dimensions has one row, itself.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PIECE_BYTES = 1 << 25
"""Bytes that are read and written at a time, unless a single row has more: 32 MiB."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is not in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    files: tuple[str, ...]
    """Where its bytes are, for messages."""

    read: Callable[[int, int], Tensor]
    """Rows from a first to before a last one; the result may share memory with the file and is not written to."""

    @property
    def rows(self) -> int:
        """Length of the first dimension."""
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return math.prod(self.shape) * self.dtype.itemsize

    def nbytes_of(self, rows: int) -> int:
        """Bytes of some rows."""
        return self.nbytes // max(self.rows, 1) * rows

    def all(self) -> Tensor:
        """All of it."""
        return self.read(0, self.rows)

    def pieces(self, limit: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
        """First and last row of consecutive pieces of at most `limit` bytes, or of one row if that has more."""
        step = max(limit // max(self.nbytes_of(1), 1), 1)
        for start in range(0, self.rows, step):
            yield start, min(start + step, self.rows)


def in_memory(tensor: Tensor, file: str) -> LazyTensor:
    """A tensor that is in memory after all, or mapped into it."""
    read = (lambda start, stop: tensor[start:stop]) if tensor.dim() else (lambda start, stop: tensor)
    return LazyTensor(tensor.dtype, tuple(tensor.shape), (file,), read)


def cast(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """The same numbers in another dtype."""
    if tensor.dtype == dtype:
        return tensor
    return replace(tensor, dtype=dtype, read=lambda start, stop: tensor.read(start, stop).to(dtype))


def stack(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Equal shapes [...] as one tensor [len(parts), ...]."""

    def read(start: int, stop: int) -> Tensor:
        return torch.stack([part.all() for part in parts[start:stop]])

    return LazyTensor(parts[0].dtype, (len(parts), *parts[0].shape), _files(parts), read)


def item(tensor: LazyTensor, index: int) -> LazyTensor:
    """One of those that were stacked."""

    def read(start: int, stop: int) -> Tensor:
        return tensor.read(index, index + 1)[0, start:stop]

    return replace(tensor, shape=tensor.shape[1:], read=read)


def narrow(tensor: LazyTensor, dim: int, start: int, length: int) -> LazyTensor:
    """`length` entries of dimension `dim` from `start` on."""

    def read(first: int, last: int) -> Tensor:
        if dim == 0:
            return tensor.read(start + first, start + last)
        return tensor.read(first, last).narrow(dim, start, length)

    shape = tuple(length if i == dim else size for i, size in enumerate(tensor.shape))
    return replace(tensor, shape=shape, read=read)


def concatenate(parts: Sequence[LazyTensor], dim: int) -> LazyTensor:
    """Parts one after another along `dim`."""
    if len(parts) == 1:
        return parts[0]

    def read(start: int, stop: int) -> Tensor:
        if dim:
            return torch.cat([part.read(start, stop) for part in parts], dim)
        found, before = [], 0
        for part in parts:
            first, last = max(start - before, 0), min(stop - before, part.rows)
            if first < last:
                found.append(part.read(first, last))
            before += part.rows
        return found[0] if len(found) == 1 else torch.cat(found)

    size = sum(part.shape[dim] for part in parts)
    shape = tuple(size if i == dim else length for i, length in enumerate(parts[0].shape))
    return LazyTensor(parts[0].dtype, shape, _files(parts), read)


def halves_from_pairs(tensor: LazyTensor, head_dim: int) -> LazyTensor:
    """Rows of each head, of which neighbours are turned together, so that row i is turned with row i + head_dim / 2."""
    return _within_heads(tensor, head_dim, (head_dim // 2, 2))


def pairs_from_halves(tensor: LazyTensor, head_dim: int) -> LazyTensor:
    """The inverse of `halves_from_pairs`."""
    return _within_heads(tensor, head_dim, (2, head_dim // 2))


def _within_heads(tensor: LazyTensor, head_dim: int, split: tuple[int, int]) -> LazyTensor:
    def read(start: int, stop: int) -> Tensor:
        first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
        heads = tensor.read(first, last)
        turned = heads.unflatten(0, (-1, *split)).transpose(1, 2).flatten(0, 2)
        return turned[start - first : stop - first]

    return replace(tensor, read=read)


def _files(parts: Sequence[LazyTensor]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(file for part in parts for file in part.files))
