"""Products on the hardware: PyTorch's `scaled_mm` for float8 and NVFP4, torchao's fused casts and products for MXFP8.

Kernels take dimensions in multiples of 16 (float8) or 32, and what is summed over may be a number of tokens, so zeros
are added where needed and cut off again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from titan_quant.compat import mxfp8_linear, packed_e2m1, swizzled_scales
from titan_quant.formats import Quantized

_MXFP8_TOKENS = 128  # torchao's kernels cast tiles of so many rows


def scaled_product(a: Quantized, b: Quantized, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """The product of what `a` [R, C] and `b` [S, C] stand for -> [R, S] of `dtype`.

    `fast` lets Hopper's tensor cores sum in fewer bits, which is enough for a layer's output.
    """
    rows = b.codes.shape[0]
    if a.outer is not None and b.outer is not None:
        return _nvfp4(a, b, a.outer * b.outer, dtype)
    left, right = _multiple(a.codes, 1, 16), _multiple(b.codes, 16, 16)
    if a.scale.ndim == 0 and b.scale.ndim == 0:
        return _float8(left, right, a.scale, b.scale, ScalingType.TensorWise, dtype, fast)[:, :rows]
    if fast and dtype == torch.bfloat16:
        scales = _for_rows(a.scale, left), _for_rows(b.scale, right).T
        return _float8(left, right, *scales, ScalingType.RowWise, dtype, fast)[:, :rows]
    # The kernel for rows writes bfloat16 only, and is slow where it sums exactly: as torchao does, scale afterwards.
    one = torch.ones((), device=left.device)
    out = _float8(left, right, one, one, ScalingType.TensorWise, dtype, fast)[:, :rows]
    return (out * a.scale * (b.scale.T if b.scale.ndim else b.scale)).to(dtype)


def _float8(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, kind: ScalingType, dtype: torch.dtype, fast: bool
) -> Tensor:
    return F.scaled_mm(a, b.T, a_scale, kind, b_scale, kind, output_dtype=dtype, use_fast_accum=fast)


def mxfp8(x: Tensor, weight: Tensor, rounding: str) -> Tensor:
    """`x` [.., K] times `weight` [N, K] -> [.., N], differentiable; scales rounded by `floor` or `rceil`."""
    rows = x.reshape(-1, x.shape[-1])
    out = mxfp8_linear(_multiple(rows, _MXFP8_TOKENS, 1), weight, rounding)[: rows.shape[0]]
    return out.view(*x.shape[:-1], weight.shape[0])


def _nvfp4(a: Quantized, b: Quantized, outer: Tensor, dtype: torch.dtype) -> Tensor:
    rows = b.codes.shape[0]
    left, right = packed_e2m1(_multiple(a.codes, 1, 32)), packed_e2m1(_multiple(b.codes, 16, 32))
    scales = [swizzled_scales(x.scale.to(torch.float8_e4m3fn)) for x in (a, b)]
    kind, order = ScalingType.BlockWise1x16, SwizzleType.SWIZZLE_32_4_4
    out = F.scaled_mm(
        left,
        right.T,
        scales[0].flatten(),
        kind,
        scales[1].flatten(),
        kind,
        swizzle_a=order,
        swizzle_b=order,
        output_dtype=torch.bfloat16,
    )
    return (out[:, :rows] * outer).to(dtype)


def _multiple(x: Tensor, rows: int, columns: int) -> Tensor:
    """`x` [R, C] with zeros up to multiples of `rows` and `columns`; contiguous."""
    # Padding is not implemented for float8, which moves as bytes.
    missing = (0, -x.shape[1] % columns, 0, -x.shape[0] % rows)
    if not any(missing):
        return x.contiguous()
    return F.pad(x.view(torch.uint8), missing).view(x.dtype) if x.dtype.itemsize == 1 else F.pad(x, missing)


def _for_rows(scale: Tensor, codes: Tensor) -> Tensor:
    """A scale of rows [R, 1], or of all, for the possibly longer `codes`."""
    if scale.ndim == 0:
        return scale.expand(codes.shape[0], 1).contiguous()
    return F.pad(scale, (0, 0, 0, codes.shape[0] - scale.shape[0]))
