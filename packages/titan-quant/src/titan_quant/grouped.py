"""Products of experts in a recipe's arithmetic: each run of rows with a matrix of its own.

The door. A module of experts that wants its products replaced calls all of them as

    self.grouped_product(x, weight, counts)

with `x` [T, K] sorted by expert, `weight` [E, N, K] and `counts` [E] int64, how many rows each expert has, to get
[T, N]; `counts` may add up to less than T, and what the rows beyond get is of no matter. Having that method is all:
conversion puts another one in its place, on the object, and changes neither parameters nor names.

Groups may have any size. Scales that run along tokens, those of a weight's gradient, never reach from one group into
the next: groups are filled up with zero rows in here where a format needs it, which changes no result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_quant.arithmetic import Arithmetic
from titan_quant.compat import float8_rowwise_grouped, mxfp8_grouped
from titan_quant.formats import FORMATS, dequantize, quantize, scale_factor
from titan_quant.recipes import Cast

_FLOAT8_ROWS, _MXFP8_ROWS = 16, 32  # what torchao's kernels want the sizes of groups to be multiples of


class GroupedExperts(Protocol):
    """A module of experts whose products can be replaced."""

    grouped_product: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(x [T, K], weight [E, N, K], counts [E] int64) -> [T, N]."""


@dataclass(frozen=True)
class LowPrecisionProduct:
    """What takes the place of a module's `grouped_product`."""

    arithmetic: Arithmetic

    def __call__(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """`x` [T, K] sorted by expert times each expert's `weight` [E, N, K] -> [T, N] in the dtype of `x`."""
        if self.arithmetic.emulate:
            return _Grouped.apply(x, weight, counts, self.arithmetic)
        cast = self.arithmetic.recipe.rounding("output")[0]
        filled = FilledGroups(counts, x.shape[0], _MXFP8_ROWS if cast.scope == "block" else _FLOAT8_ROWS)
        if cast.scope == "block":
            out = mxfp8_grouped(filled.fill(x), weight, filled.ends, cast.rounding)
        else:
            out = float8_rowwise_grouped(filled.fill(x), weight, filled.ends)
        return filled.take(out)


def convert_experts(module: GroupedExperts, arithmetic: Arithmetic) -> None:
    """Makes `module` compute its products in `arithmetic`."""
    module.grouped_product = LowPrecisionProduct(arithmetic)


class FilledGroups:
    """Where rows go when the groups of `counts` [E] within `rows` rows are filled up to multiples of `multiple`.

    How many rows there are then is an upper bound that does not depend on the counts, so that nobody waits for them.
    """

    def __init__(self, counts: Tensor, rows: int, multiple: int) -> None:
        sizes = (counts + multiple - 1) // multiple * multiple
        self.rows = -(-rows // multiple) * multiple + counts.shape[0] * multiple
        self.ends = sizes.cumsum(0).to(torch.int32)
        shift = (sizes - counts).cumsum(0) - (sizes - counts)
        row = torch.arange(rows, device=counts.device)
        group = group_of_rows(counts, rows)
        # Rows that belong to no group go behind all groups.
        behind = self.rows - rows + row
        self._place = torch.where(group < counts.shape[0], row + F.pad(shift, (0, 1))[group], behind)

    def fill(self, x: Tensor) -> Tensor:
        """`x` [T, C] with zero rows between -> [rows, C]."""
        return x.new_zeros(self.rows, x.shape[1]).index_copy(0, self._place, x)

    def take(self, x: Tensor) -> Tensor:
        """The rows [T, C] that `fill` was given."""
        return x[self._place]


def group_of_rows(counts: Tensor, rows: int) -> Tensor:
    """The group of each of `rows` rows, of which `counts` [E] belong to each group; E for those behind all."""
    return torch.searchsorted(counts.cumsum(0), torch.arange(rows, device=counts.device), right=True)


class _Grouped(torch.autograd.Function):
    """In software: operands are rounded, and what they stand for multiplied group by group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor, arithmetic: Arithmetic) -> Tensor:
        ctx.save_for_backward(x, weight, counts)
        ctx.recipe = arithmetic.recipe
        operands = _rounded(x, weight, arithmetic.recipe.rounding("output"), x.dtype)
        return grouped_products(*operands, counts).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, counts = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            operands = _rounded(grad, weight.transpose(1, 2), ctx.recipe.rounding("grad_input"), x.dtype)
            grad_x = grouped_products(*operands, counts).to(x.dtype)
        if ctx.needs_input_grad[1]:
            casts = ctx.recipe.rounding("grad_weight")
            wide = torch.promote_types(weight.dtype, torch.float32)
            gradient, activation = (
                round_columns(t, cast, counts).to(wide) for t, cast in zip((grad, x), casts, strict=True)
            )
            grad_weight = grouped_weight_gradients(gradient, activation, counts).to(weight.dtype)
        return grad_x, grad_weight, None, None


def _rounded(a: Tensor, b: Tensor, casts: tuple[Cast, Cast], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    return dequantize(quantize(a, casts[0])).to(wide), dequantize(quantize(b, casts[1])).to(wide)


def round_columns(x: Tensor, cast: Cast, counts: Tensor) -> Tensor:
    """`x` [T, C] rounded with scales along tokens, of one group each -> [T, C] float32."""
    if cast.scope == "block":
        filled = FilledGroups(counts, x.shape[0], cast.block)
        return filled.take(dequantize(quantize(filled.fill(x).T, cast)).T)
    x = x.float()
    group = group_of_rows(counts, x.shape[0])
    amax = x.new_zeros(counts.shape[0] + 1, x.shape[1])
    amax = amax.scatter_reduce(0, group[:, None].expand_as(x), x.abs(), "amax")
    factor = scale_factor(amax, cast)[group]
    largest = FORMATS[cast.format].largest
    return (x * factor).clamp(-largest, largest).to(getattr(torch, cast.format)).float() / factor


# Operators of their own, so that compilers and fake tensors, which know no counts, see calls with known shapes.
@torch.library.custom_op("titan_quant::grouped_products", mutates_args=())
def grouped_products(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiplies each expert's rows of `x` [T, K] with its `weight` [E, N, K] -> [T, N]; zeros behind all groups."""
    out = x.new_zeros(x.shape[0], weight.shape[1])
    start = 0
    for own, size in zip(weight, counts.tolist(), strict=True):
        out[start : start + size] = x[start : start + size] @ own.T
        start += size
    return out


@torch.library.custom_op("titan_quant::grouped_weight_gradients", mutates_args=())
def grouped_weight_gradients(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """Gradient [E, N, K] of the weights from that of the products, `grad` [T, N], and their input `x` [T, K]."""
    out = x.new_empty(counts.shape[0], grad.shape[1], x.shape[1])
    start = 0
    for own, size in zip(out, counts.tolist(), strict=True):
        torch.mm(grad[start : start + size].T, x[start : start + size], out=own)
        start += size
    return out


@grouped_products.register_fake
def _products_shape(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@grouped_weight_gradients.register_fake
def _weight_gradients_shape(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], grad.shape[1], x.shape[1])
