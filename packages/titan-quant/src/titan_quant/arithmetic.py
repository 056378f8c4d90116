"""The three products of a linear layer, in the arithmetic of a recipe.

Operands are rounded here, in plain tensor operations that a compiler fuses. Their product is one of two: in software,
of the rounded numbers, on any device; or by PyTorch's `scaled_mm`, of the codes. Both see the same codes, so
what is shown in software for rounding holds for the hardware; what is left to trust is how the hardware sums.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from titan_quant.compat import largest_of_ranks
from titan_quant.formats import Quantized, dequantize, quantize
from titan_quant.kernels import scaled_product
from titan_quant.recipes import OPERANDS, Operand, Product, Recipe


@dataclass(frozen=True)
class Sharing:
    """Ranks that hold parts of one layer's operands, cut along features."""

    group: ProcessGroup
    cut: tuple[Operand, ...]
    """The operands of which each rank has a part; others are whole on every rank."""


@dataclass(frozen=True)
class Arithmetic:
    """How a layer's products are computed."""

    recipe: Recipe
    emulate: bool
    """Whether in software."""
    sharing: Sharing | None = None
    """With whom scales are shared, if with anyone: then each is that of the whole operand."""


def linear(x: Tensor, weight: Tensor, arithmetic: Arithmetic, weight_amax: Tensor | None = None) -> Tensor:
    """`x` [.., K] times `weight` [N, K] -> [.., N] in the dtype of `x`, and likewise backward.

    `weight_amax` [] float32 is the largest magnitude of the weight, where the recipe wants it and it is known.
    """
    return _Linear.apply(x, weight, weight_amax, arithmetic)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, weight_amax: Tensor | None, arithmetic: Arithmetic) -> Tensor:
        ctx.save_for_backward(x, weight, weight_amax)
        ctx.arithmetic = arithmetic
        out = _product("output", _rows(x), weight, arithmetic, (None, weight_amax), x.dtype)
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, weight_amax = ctx.saved_tensors
        grad = _rows(grad_outputs[0])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _product("grad_input", grad, weight.T, ctx.arithmetic, (None, weight_amax), x.dtype)
            grad_x = grad_x.view_as(x)
        if ctx.needs_input_grad[1]:
            grad_weight = _product("grad_weight", grad.T, _rows(x).T, ctx.arithmetic, (None, None), weight.dtype)
        return grad_x, grad_weight, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _product(
    product: Product,
    a: Tensor,
    b: Tensor,
    arithmetic: Arithmetic,
    amax: tuple[Tensor | None, Tensor | None],
    dtype: torch.dtype,
) -> Tensor:
    """`a` [R, C] times `b` [S, C] -> [R, S] of `dtype`, rounded as the recipe says for `product`."""
    casts = arithmetic.recipe.casts(product)
    if casts is None or a.numel() == 0:
        return (a @ b.T).to(dtype)
    share = _sharing(product, arithmetic)
    left = quantize(a, casts[0], amax=amax[0], share=share[0])
    right = quantize(b, casts[1], amax=amax[1], share=share[1])
    if not arithmetic.emulate:
        return scaled_product(left, right, dtype, fast=product == "output")
    return emulated_product(left, right, dtype)


def emulated_product(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """The product of the numbers that `a` [R, C] and `b` [S, C] stand for, [R, S] of `dtype`.

    It is summed in float32; in float64 if that is asked for, where the order of a sum hardly ever decides how the next
    layer rounds, so that layouts can be compared.
    """
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(a.codes.device.type, enabled=False):
        return (dequantize(a).to(wide) @ dequantize(b).to(wide).T).to(dtype)


def _sharing(
    product: Product, arithmetic: Arithmetic
) -> tuple[Callable[[Tensor], Tensor] | None, Callable[[Tensor], Tensor] | None]:
    """For both operands how the largest magnitude of a part becomes that of the whole; None: it is whole."""
    sharing, casts = arithmetic.sharing, arithmetic.recipe.casts(product)
    if sharing is None or casts is None:
        return None, None
    group, cut = sharing.group, [operand in sharing.cut for operand in OPERANDS[product]]

    def share(amax: Tensor) -> Tensor:
        return largest_of_ranks(amax, group)

    # The scale of an operand concerns all of it; that of a row only the ranks that hold parts of the same row, which is
    # where the dimension that is summed over is cut: in both operands alike. Blocks are never cut.
    needed = [cut[i] and (cast.scope != "row" or all(cut)) for i, cast in enumerate(casts)]
    return share if needed[0] else None, share if needed[1] else None
