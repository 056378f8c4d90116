"""Numbers between -1 and 1 in a byte or half of one: codes, and the numbers that they stand for.

A number becomes the code whose number is nearest, found in a table by the number's own leading bits (a binary search
takes forty times as long on a CPU). So it is first rounded to twelve significant bits, an error of at most 2^-12 of it,
on top of half the gap between two numbers of the book.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Bits of a float32 that are too far behind to decide about a code: of 23 stored ones, 11 are left.
_IGNORED_BITS = 12
_PATTERNS = 2 ** (32 - _IGNORED_BITS)


def dynamic_numbers(bits: int, *, signed: bool) -> list[float]:
    """The numbers of the dynamic data type of Dettmers et al., arXiv 2110.02861, sections 1.3 and 2.2, ascending.

    They span as many decades as there are bits without the sign: those of decade k, counted from the smallest, are the
    middles of 2^k (`signed`) or 2^(k+1) equal parts of a tenth of its top to its top. Zero and one come on top.
    """
    decades = bits - 1
    numbers = [0.0, 1.0]
    for k in range(decades):
        top, parts = 10.0 ** (k - decades + 1), 2 ** (k if signed else k + 1)
        middles = [top * (0.1 + 0.9 * (i + 0.5) / parts) for i in range(parts)]
        numbers += middles + [-number for number in middles] * signed
    return sorted(numbers)


def linear_numbers(bits: int) -> list[float]:
    """Equal steps up to one, without zero, as Li et al., arXiv 2309.01507, keep second moments.

    One that became zero would make the update as large as eps allows.
    """
    return [(i + 1) / 2**bits for i in range(2**bits)]


class Codebook:
    """Codes of some ascending `numbers` within bytes, of which each code takes the bits from `shift` on."""

    def __init__(self, numbers: Sequence[float], device: torch.device, *, shift: int = 0) -> None:
        known = torch.tensor(numbers, dtype=torch.float32, device=device)
        middles = (known[1:] + known[:-1]) / 2
        patterns = torch.arange(_PATTERNS, dtype=torch.int64, device=device) << _IGNORED_BITS
        centres = (patterns + (1 << (_IGNORED_BITS - 1))).to(torch.int32).view(torch.float32)
        self._codes = (torch.bucketize(centres, middles) << shift).to(torch.uint8)
        every_byte = torch.arange(256, device=device)
        self._numbers = known[(every_byte >> shift) % len(known)]

    def encode(self, x: Tensor) -> Tensor:
        """The bytes (uint8) of float32 numbers `x` of any shape, zero but for this book's bits."""
        patterns = x.contiguous().view(torch.int32).bitwise_right_shift(_IGNORED_BITS).bitwise_and_(_PATTERNS - 1)
        return self._codes.index_select(0, patterns.flatten()).view(x.shape)

    def decode(self, codes: Tensor) -> Tensor:
        """The float32 numbers of bytes (uint8) of any shape; bits that are not this book's do not matter."""
        return self._numbers.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)
