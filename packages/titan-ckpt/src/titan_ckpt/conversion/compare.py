"""Two collections of tensors, tensor by tensor, a piece of each at a time."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from titan_ckpt.formats.collection import Tensors
from titan_ckpt.formats.lazy import LazyTensor


@dataclass(frozen=True)
class Difference:
    """How a tensor differs; all that follows the name is None where it has no meaning."""

    name: str
    what: str
    """`only in A`, `only in B`, `shape`, `dtype` (the numbers are equal), or `numbers`."""

    detail: str
    largest: float | None = None
    """Largest absolute difference of two numbers; nan where one is nan and the other not."""


def differences(
    one: Tensors, other: Tensors, on_read: Callable[[int], object] = lambda size: None
) -> Iterator[Difference]:
    """Every difference, in the order of the names; `on_read` is called with the bytes of each piece of `one`."""
    for name in sorted({*one, *other}):
        if name not in other:
            yield Difference(name, "only in A", _form(one[name]))
        elif name not in one:
            yield Difference(name, "only in B", _form(other[name]))
        elif one[name].shape != other[name].shape:
            yield Difference(name, "shape", f"{_form(one[name])} and {_form(other[name])}")
        else:
            yield from _numbers(name, one[name], other[name], on_read)


def _numbers(name: str, one: LazyTensor, other: LazyTensor, on_read: Callable[[int], object]) -> Iterator[Difference]:
    largest, count = 0.0, 0
    for piece in one.pieces():
        a, b = one.read(*piece), other.read(*piece)
        on_read(a.nbytes)
        if a.dtype == b.dtype and torch.equal(a, b):
            continue
        gap = (a.to(torch.float64) - b.to(torch.float64)).abs()
        gap[(a == b) | (a.isnan() & b.isnan())] = 0.0  # infinities have no difference
        count += int((gap != 0).sum())
        worst = float(gap.max()) if gap.numel() else 0.0
        largest = math.nan if math.isnan(worst + largest) else max(largest, worst)
    if count:
        yield Difference(name, "numbers", f"{count:,} numbers differ", largest)
    elif one.dtype != other.dtype:
        yield Difference(name, "dtype", f"{_form(one)} and {_form(other)}")


def _form(tensor: LazyTensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
