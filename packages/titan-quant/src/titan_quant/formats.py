"""Number formats and the scales that go with them: rounding an operand, and getting it back.

An operand is scaled so that its largest value becomes the largest of the format, and then rounded to the nearest number
of it, ties to even. Its last dimension is the one that a product sums over, and what the scales of rows and blocks run
along. What does not become finite numbers stays not finite: a recipe never hides a loss that diverged.

Sources: float8, arXiv 2209.05433; MX, OCP Microscaling Formats v1.0, section 6.3; `rceil` and the two levels of
NVFP4's scales, the cuBLAS manual, "1D block scaling"; `even`, as in torchao.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_quant.recipes import Cast

# The smallest largest value that is scaled up whole: beyond it, scales would leave the range of float32.
TINY = 2.0**-100


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a number format can hold."""

    largest: float
    """Largest finite number."""
    exponent: int
    """Power of two of the largest number."""
    mantissa: int
    """Bits after the leading one."""
    step: float
    """Distance of the numbers nearest to zero."""


FORMATS: Mapping[str, Format] = {
    "float8_e4m3fn": Format(largest=448.0, exponent=8, mantissa=3, step=2.0**-9),
    "float8_e5m2": Format(largest=57344.0, exponent=15, mantissa=2, step=2.0**-16),
    "float4_e2m1fn_x2": Format(largest=6.0, exponent=2, mantissa=1, step=0.5),
}

# Block scales of NVFP4 are e4m3 numbers, kept from becoming subnormal.
E4M3_LARGEST, E4M3_SMALLEST = 448.0, 2.0**-6


class Quantized(NamedTuple):
    """An operand [.., R, C] rounded to a format: `codes * scale * outer` is about what it was."""

    codes: Tensor
    """[.., R, C] in the format; those of four bits, which torch cannot cast to, as float32 numbers of the format."""
    scale: Tensor
    """float32: [] for a tensor, [.., R, 1] for rows, [.., R, ceil(C / block)] for blocks."""
    outer: Tensor | None = None
    """[] float32: the scale of the scales of NVFP4."""
    block: int = 0
    """Columns that share a scale, if it is one of blocks."""


def quantize(
    x: Tensor,
    cast: Cast,
    *,
    amax: Tensor | None = None,
    share: Callable[[Tensor], Tensor] | None = None,
) -> Quantized:
    """Rounds the operand `x` [.., R, C], of any float dtype, as `cast` says.

    `amax` [] is its largest magnitude, where a scale of the whole operand needs it and it is known. `share` makes that
    of a part into that of the whole: for scales of rows or of the operand, of which this process has only some columns.
    """
    x = x.float()
    form = FORMATS[cast.format]
    if cast.scope == "block":
        return _quantize_blocks(x, cast, form, amax, share)
    if amax is None or cast.scope == "row":
        magnitudes = x.abs()
        amax = magnitudes.amax(-1, keepdim=True) if cast.scope == "row" else magnitudes.amax()
        if share is not None:
            amax = share(amax)
    factor = scale_factor(amax, cast)
    return Quantized(_round(x * factor, cast.format), factor.reciprocal())


def scale_factor(amax: Tensor, cast: Cast) -> Tensor:
    """What values of magnitude at most `amax` are multiplied by before they are rounded; float32, as `amax`."""
    factor = FORMATS[cast.format].largest / amax.float().clamp(min=TINY)
    return _power_of_two_below(factor) if cast.scale == "power_of_two" else factor


def dequantize(x: Quantized) -> Tensor:
    """The float32 numbers that `x` stands for, [.., R, C]."""
    codes = x.codes.float()
    scale = x.scale if x.outer is None else x.scale * x.outer
    if not x.block:
        return codes * scale
    return (_blocks(codes, x.block) * scale[..., None]).flatten(-2)[..., : codes.shape[-1]]


def _quantize_blocks(
    x: Tensor, cast: Cast, form: Format, amax: Tensor | None, share: Callable[[Tensor], Tensor] | None
) -> Quantized:
    blocks = _blocks(x, cast.block)
    largest = blocks.abs().amax(-1)
    outer = None
    if cast.scale == "e8m0":
        scale = _e8m0(largest, form, cast)
        scaled = blocks / scale[..., None]
    else:
        if amax is None:
            amax = largest.amax()
            if share is not None:
                amax = share(amax)
        outer = amax.float().clamp(min=TINY) / (E4M3_LARGEST * form.largest)
        scale = (largest / form.largest / outer).clamp(E4M3_SMALLEST, E4M3_LARGEST).to(torch.float8_e4m3fn).float()
        scaled = blocks * (outer.reciprocal() / scale)[..., None]
    return Quantized(_round(scaled, cast.format).flatten(-2)[..., : x.shape[-1]], scale, outer, cast.block)


def _blocks(x: Tensor, size: int) -> Tensor:
    """The last dimension as [blocks, size]; zeros fill the last block up, and change no scale and no sum."""
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def _e8m0(amax: Tensor, form: Format, cast: Cast) -> Tensor:
    """The power of two that a block with the largest magnitude `amax` is divided by, float32, at least 2**-126.

    `floor` (of the OCP specification) lets values up to an eighth above the largest number be cut off, `ceil` and
    `rceil` none, of which the second wastes less; `even` rounds the largest value to the format first.
    """
    if cast.rounding == "rceil":
        amax = amax / form.largest
    bits = amax.view(torch.int32)
    if cast.rounding == "even":
        bits = bits + (1 << (22 - form.mantissa))
    exponent = (bits >> 23) - 127
    if cast.rounding in ("ceil", "rceil"):
        exponent = exponent + ((bits & 0x7FFFFF) > 0).to(torch.int32)
    if cast.rounding != "rceil":
        exponent = exponent - form.exponent
    scale = ((exponent.clamp(-126, 127) + 127) << 23).view(torch.float32)
    return torch.where(amax.isfinite(), scale, torch.nan)


def _power_of_two_below(x: Tensor) -> Tensor:
    """The largest power of two that is not larger than each of `x` (float32, positive and normal, or zero or NaN)."""
    return torch.where(x.isnan(), x, (x.view(torch.int32) & 0x7F800000).view(torch.float32))


def _round(x: Tensor, name: str) -> Tensor:
    largest = FORMATS[name].largest
    x = x.clamp(-largest, largest)
    return _round_to_e2m1(x) if name == "float4_e2m1fn_x2" else x.to(getattr(torch, name))


def _round_to_e2m1(x: Tensor) -> Tensor:
    """`x`, at most 6 in magnitude, to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4 and 6, as float32."""
    magnitude = x.abs()
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    return torch.round(x / step) * step
