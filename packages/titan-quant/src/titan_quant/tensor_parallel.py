"""Tensor parallelism in a recipe's arithmetic: scales that do not depend on the cut, and gathers of float8 codes.

A layer that is cut by columns (of its output features) has a part of its weight and of its outputs' gradient; one cut
by rows a part of its weight and of its input. Where what shares a scale is cut, its largest magnitude is a maximum over
the ranks: one number for an operand, or one for each row of it. With that (`share_scales`), a layer computes what it
computes on one device, up to the order of float32 sums. Blocks of 16 or 32 values are never cut.

With the sequence cut between layers, what enters and leaves a region of them passes between ranks. The recipe
float8_tensorwise rounds an activation the same way for all its products, so it can be rounded before it is sent: the
layers round it once more, to the same codes. The other recipes need it unrounded, or rounded in several ways.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from titan_quant.arithmetic import Sharing
from titan_quant.compat import gather_ranks, largest_of_ranks, sum_scattered
from titan_quant.convert import Conversion
from titan_quant.formats import dequantize, quantize
from titan_quant.linear import LowPrecisionLinear
from titan_quant.recipes import Cast, Operand

_CUT: Mapping[str, tuple[Operand, ...]] = {"colwise": ("weight", "gradient"), "rowwise": ("weight", "activation")}


class TensorParallelError(ValueError):
    """A layer is cut where its number format cannot be."""


def share_scales(model: nn.Module, roles: Mapping[str, str], group: ProcessGroup) -> None:
    """Lets converted layers of `model` with the roles `colwise` and `rowwise` find their scales with `group`'s ranks.

    Call it once the weights are cut over `group`, as DTensors or not, and before the first forward pass. `roles` (FQN
    -> role) may name modules that `model` does not have.

    Raises:
        TensorParallelError: if a weight is cut between values that share a scale.
    """
    for fqn, module in model.named_modules():
        cut = _CUT.get(roles.get(fqn, ""))
        if cut is None or not isinstance(module, LowPrecisionLinear):
            continue
        recipe = module.arithmetic.recipe
        weight = cast(Tensor, module._parameters["weight"])
        size = weight.shape[0 if roles[fqn] == "colwise" else 1]
        own = size // group.size() if hasattr(weight, "device_mesh") else size
        if own % recipe.multiple:
            raise TensorParallelError(
                f"Tensor parallelism leaves {fqn!r} {own} features on each of {group.size()} ranks, which are not a "
                f"multiple of {recipe.multiple}, as its number format needs. Use fewer ranks, or exclude the layer by "
                "quant.exclude."
            )
        module.arithmetic = replace(module.arithmetic, sharing=Sharing(group, cut))


@dataclass(frozen=True, kw_only=True)
class Float8Regions:
    """Between which modules activations may pass as float8."""

    entered: tuple[str, ...]
    """FQNs of regions whose input may be gathered by `gather_float8`: only converted layers read it."""
    left: tuple[str, ...]
    """FQNs of row-cut layers whose output may be reduced by `scatter_sum_float8`."""


def float8_regions(conversion: Conversion, roles: Mapping[str, str]) -> Float8Regions:
    """Where float8 may travel in a model that `conversion` describes; `roles` (FQN -> role) of its modules.

    Of a role `region` everything that has the role `colwise`, `gate` or `experts` reads the input.
    """
    if not conversion.recipe.gathers_weights:
        return Float8Regions(entered=(), left=())
    converted = set(conversion.linears)
    readers: dict[str, list[str]] = {fqn: [] for fqn, role in roles.items() if role == "region"}
    for fqn, role in roles.items():
        region = next((name for name in _around(fqn) if name in readers), None)
        if region is not None and role in ("colwise", "gate", "experts"):
            readers[region].append(fqn)
    return Float8Regions(
        entered=tuple(region for region, names in readers.items() if names and converted.issuperset(names)),
        left=tuple(fqn for fqn, role in roles.items() if role == "rowwise" and fqn in converted),
    )


def _around(fqn: str) -> list[str]:
    """The names of the modules around `fqn`, innermost first."""
    parts = fqn.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


_ACTIVATION = Cast(format="float8_e4m3fn", scope="tensor", scale="float32")
_GRADIENT = Cast(format="float8_e5m2", scope="tensor", scale="float32")


def gather_float8(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Concatenates the ranks' parts along `dim`, rounded to e4m3; its backward hands each rank the summed gradient of
    its own part, unrounded.
    """
    return _Gather.apply(x, dim, group)


def scatter_sum_float8(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Sums over the ranks, unrounded, and keeps this rank's part along `dim`; its backward gathers in e5m2."""
    return _ScatterSum.apply(x, dim, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gather(x, dim, group, _ACTIVATION)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return _scatter(grad_outputs[0], ctx.dim, ctx.group), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad_outputs[0], ctx.dim, ctx.group, _GRADIENT), None, None


def _gather(x: Tensor, dim: int, group: ProcessGroup, rounding: Cast) -> Tensor:
    rounded = quantize(x, rounding, share=lambda amax: largest_of_ranks(amax, group))
    # Bytes: not every backend knows float8.
    gathered = gather_ranks(rounded.codes.view(torch.uint8).contiguous(), group).view(rounded.codes.dtype)
    values = dequantize(rounded._replace(codes=gathered)).to(x.dtype)
    return values if dim == 0 else torch.cat(values.chunk(group.size()), dim)


def _scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    if dim != 0:
        x = torch.cat(x.chunk(group.size(), dim))
    return sum_scattered(x.contiguous(), group)
