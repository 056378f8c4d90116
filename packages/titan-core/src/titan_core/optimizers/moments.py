"""How the two moments of AdamW are kept between steps: in a float format, in a byte each, or in half a byte each.

What is kept are tensors of the parameter's shape, and of its blocks, spread over ranks as the parameter is. So a
checkpoint of them is resharded like any other, and codes and scales move as they are. How a parameter's moments are
kept follows from its global shape alone.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from titan_core.config import StateDtype
from titan_core.optimizers.blocks import Blocks, as_rows
from titan_core.optimizers.codebook import Codebook, dynamic_numbers, linear_numbers
from titan_core.optimizers.stochastic import high_half, low_half, round_stochastically

# Vectors, and matrices with fewer elements, take next to no memory and matter most: they stay in float32.
_LEAST_QUANTIZED = 4096
_SCALES = ("exp_avg_scale", "exp_avg_sq_scale")


class Moments(Protocol):
    """The moments of one parameter; a `state` holds what `create` returns."""

    def create(self) -> dict[str, Tensor]:
        """Moments of zero, as and where they are kept."""
        ...

    def read(self, state: dict[str, Tensor], rows: slice) -> tuple[Tensor, Tensor]:
        """Both moments of some rows [n, columns], to compute with; may be views of the state."""
        ...

    def write(self, state: dict[str, Tensor], rows: slice, first: Tensor, second: Tensor, bits: Tensor | None) -> None:
        """Keeps both moments of some rows, and may overwrite them.

        `bits`: 32 random ones for each element to round bfloat16 with, overwritten; None rounds to nearest.
        """
        ...


class MomentStore:
    """How an optimizer keeps the moments of its parameters."""

    def __init__(self, dtype: StateDtype, *, on_host: bool = False) -> None:
        """`on_host`: keep them in the host's memory, pinned if there is a GPU, and compute where the parameters are."""
        self._dtype, self._on_host = dtype, on_host
        self._formats: dict[torch.device, _ByteFormat] = {}

    def moments_of(self, parameter: Tensor) -> Moments:
        """How those of one parameter are kept."""
        if self._dtype == "bfloat16":
            return FloatMoments(parameter, torch.bfloat16, on_host=self._on_host)
        if self._dtype == "float32" or parameter.ndim < 2 or parameter.numel() < _LEAST_QUANTIZED:
            return FloatMoments(parameter, wide_dtype(parameter), on_host=self._on_host)
        if parameter.device not in self._formats:
            self._formats[parameter.device] = _BYTE_FORMATS[self._dtype](parameter.device)
        return ByteMoments(parameter, self._formats[parameter.device], on_host=self._on_host)


def wide_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype in which steps of `parameter` are computed: its own, or float32 if that is wider."""
    return torch.promote_types(parameter.dtype, torch.float32)


class FloatMoments:
    """Both moments in a float format."""

    def __init__(self, parameter: Tensor, dtype: torch.dtype, *, on_host: bool) -> None:
        self._parameter, self._dtype, self._on_host = parameter, dtype, on_host
        self._options = {"device": parameter.device, "dtype": wide_dtype(parameter), "non_blocking": True}

    def create(self) -> dict[str, Tensor]:
        """`exp_avg` and `exp_avg_sq`."""
        return {
            name: _zeros_like(self._parameter, self._dtype, on_host=self._on_host) for name in ("exp_avg", "exp_avg_sq")
        }

    def read(self, state: dict[str, Tensor], rows: slice) -> tuple[Tensor, Tensor]:
        """Views of the state where it is in the right dtype and place, else copies."""
        first, second = (as_rows(state[name])[rows].to(**self._options) for name in ("exp_avg", "exp_avg_sq"))
        return first, second

    def write(self, state: dict[str, Tensor], rows: slice, first: Tensor, second: Tensor, bits: Tensor | None) -> None:
        """Rounds to the state's dtype; what `read` has shown is written already."""
        if bits is not None and self._dtype == torch.bfloat16:
            first, second = round_stochastically(first, low_half(bits)), round_stochastically(second, high_half(bits))
        for name, moment in (("exp_avg", first), ("exp_avg_sq", second)):
            as_rows(state[name])[rows].copy_(moment, non_blocking=True)


@dataclass(frozen=True)
class _ByteFormat:
    """Codes for two moments, and where they are kept: under two names, or one for both."""

    books: tuple[Codebook, Codebook]
    names: tuple[str, str]
    largest_block: int


# 8 bits: numbers of Dettmers et al., arXiv 2110.02861, in smaller blocks than their 2,048, which few rows fill. 4 bits:
# numbers and blocks of Li et al., arXiv 2309.01507; their scales of a second moment, by row and column, would need
# whole columns.
_BYTE_FORMATS = {
    "int8": lambda device: _ByteFormat(
        (
            Codebook(dynamic_numbers(8, signed=True), device),
            Codebook(dynamic_numbers(8, signed=False), device),
        ),
        ("exp_avg", "exp_avg_sq"),
        256,
    ),
    "int4": lambda device: _ByteFormat(
        (Codebook(dynamic_numbers(4, signed=True), device), Codebook(linear_numbers(4), device, shift=4)),
        ("moments", "moments"),
        128,
    ),
}


class ByteMoments:
    """Both moments as codes of a byte or half of one, times a float32 scale for each block of a row."""

    def __init__(self, parameter: Tensor, form: _ByteFormat, *, on_host: bool) -> None:
        self._parameter, self._form, self._on_host = parameter, form, on_host
        self._blocks = Blocks(parameter, form.largest_block)

    def create(self) -> dict[str, Tensor]:
        """Codes (uint8, of the parameter's shape) and scales (float32 [..., blocks of a row])."""
        codes = {name: _zeros_like(self._parameter, torch.uint8, on_host=self._on_host) for name in self._form.names}
        scales = self._blocks.new_scales()
        return codes | {name: _zeros_like(scales, torch.float32, on_host=self._on_host) for name in _SCALES}

    def read(self, state: dict[str, Tensor], rows: slice) -> tuple[Tensor, Tensor]:
        """Decoded copies."""
        device = self._parameter.device
        codes = {name: as_rows(state[name])[rows].to(device, non_blocking=True) for name in set(self._form.names)}
        decoded = []
        for name, book, scale in zip(self._form.names, self._form.books, _SCALES, strict=True):
            scales = as_rows(state[scale])[rows].to(device, non_blocking=True)
            blocks = self._blocks.cut(book.decode(codes[name])).mul_(self._blocks.own(scales))
            decoded.append(self._blocks.join(blocks).contiguous().to(wide_dtype(self._parameter)))
        return decoded[0], decoded[1]

    def write(self, state: dict[str, Tensor], rows: slice, first: Tensor, second: Tensor, bits: Tensor | None) -> None:
        """Finds scales, with the other ranks where blocks are shared, and the nearest codes; needs no `bits`."""
        codes: dict[str, Tensor] = {}
        for moment, name, book, scale in zip((first, second), self._form.names, self._form.books, _SCALES, strict=True):
            blocks = self._blocks.cut(moment.to(torch.float32))
            scales = self._blocks.find_scales(blocks)
            as_rows(state[scale])[rows].copy_(scales, non_blocking=True)
            own = self._blocks.own(scales)
            encoded = self._blocks.join(book.encode(blocks.div_(torch.where(own == 0, 1.0, own))))
            codes[name] = codes[name] | encoded if name in codes else encoded
        for name, code in codes.items():
            as_rows(state[name])[rows].copy_(code, non_blocking=True)


def _zeros_like(tensor: Tensor, dtype: torch.dtype, *, on_host: bool) -> Tensor:
    if not on_host:
        return torch.zeros_like(tensor, dtype=dtype)
    return torch.zeros_like(tensor, dtype=dtype, device="cpu", pin_memory=torch.cuda.is_available())
