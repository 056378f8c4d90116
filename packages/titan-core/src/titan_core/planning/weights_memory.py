"""How large a rank's parts of parameters and of optimizer states are: arithmetic over shapes. Imports no torch.

The first rank of each axis is meant, whose parts are the largest.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from titan_core.config import OptimizerConfig
from titan_core.degrees import Degrees
from titan_core.planning.sharding_memory import Group
from titan_core.roles import ROLES

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A parameter of the whole model."""

    name: str
    """Its last name, such as `weight`."""
    shape: Shape
    """As the model has it."""
    role: str
    """That of the module that owns it."""
    trained: bool = True
    """Whether it has a gradient."""
    tensor_dim: int | None = None
    """The dimension that tensor parallelism cuts, for what a rewrite has added to a layer."""
    added: bool = False
    """Whether a rewrite has added it, so that its role says nothing about how it is cut."""


# Of each style of tensor parallelism (`titan_core.tensor`): the dimension of a weight that is cut.
_TENSOR_DIMS: Mapping[str, int] = {"vocabulary": 0, "loss": 0, "column": 0, "row": 1}


class LocalWeight(NamedTuple):
    """A parameter on the first rank."""

    weight: Weight
    whole: Shape
    """When gathered by FSDP."""
    shard: Shape
    """What it keeps of that."""
    ranks: int
    """Over which FSDP shards it."""


def local_weight(weight: Weight, degrees: Degrees) -> LocalWeight:
    """The part of `weight` that the first rank has."""
    expert = ROLES[weight.role].expert
    if expert:
        dim, parts = 0, degrees.ep
        ranks = degrees.dp_shard * degrees.cp * degrees.tp // degrees.ep
    else:
        style = ROLES[weight.role].tensor
        cut = weight.tensor_dim if weight.added else _TENSOR_DIMS.get(style or "")
        dim, parts = (0, 1) if cut is None else (cut, degrees.tp)
        ranks = degrees.dp_shard * degrees.cp
    whole = _cut(weight.shape, dim, parts)
    along = 1 if expert and whole[0] < ranks and whole[1] % ranks == 0 else 0  # as titan_core.fsdp places experts
    return LocalWeight(weight, whole, _cut(whole, along, ranks), ranks)


def _cut(shape: Shape, dim: int, parts: int) -> Shape:
    return (*shape[:dim], -(-shape[dim] // parts), *shape[dim + 1 :])


def groups_of(weights: Iterable[LocalWeight]) -> tuple[Group, ...]:
    """What FSDP gathers together, of the parameters of one unit: those that are sharded over equally many ranks."""
    by_ranks: dict[tuple[int, bool], list[LocalWeight]] = {}
    for local in weights:
        by_ranks.setdefault((local.ranks, ROLES[local.weight.role].expert), []).append(local)
    return tuple(_group(ranks, members) for (ranks, _), members in by_ranks.items())


def _group(ranks: int, members: list[LocalWeight]) -> Group:
    trained = [local for local in members if local.weight.trained]
    return Group(
        ranks=ranks,
        whole=sum(math.prod(local.whole) for local in members),
        shard=sum(math.prod(local.shard) for local in members),
        trained_whole=sum(math.prod(local.whole) for local in trained),
        trained_shard=sum(math.prod(local.shard) for local in trained),
        largest=max(math.prod(local.whole) for local in members),
    )


_STEP_BYTES = 4  # of a parameter's count of steps
_SCALE_BYTES = 4
_LEAST_QUANTIZED = 4096  # elements of a whole matrix; see titan_core.optimizers.moments
_CODES: Mapping[str, tuple[int, int]] = {"int8": (2, 256), "int4": (1, 128)}  # bytes an element, largest block
_RUN_ELEMENTS = 2**23  # of a parameter that titan_core.optimizers.adamw works on at one time on a GPU


def adamw_state_bytes(local: LocalWeight, config: OptimizerConfig, itemsize: int) -> int:
    """Bytes of AdamW's state of a trained parameter whose elements have `itemsize` bytes."""
    elements, step = math.prod(local.shard), max(itemsize, 4)
    if config.state_dtype == "bfloat16":
        return _STEP_BYTES + 2 * 2 * elements
    shape = local.weight.shape
    if config.state_dtype == "float32" or len(shape) < 2 or math.prod(shape) < _LEAST_QUANTIZED:
        return _STEP_BYTES + 2 * step * elements
    codes, largest = _CODES[config.state_dtype]
    blocks = -(-shape[-1] // largest)
    size = -(-shape[-1] // blocks)
    cuts = shape[-1] // local.shard[-1]
    # Where ranks cut a block, each keeps the scales of the whole row.
    own = blocks if cuts > 1 and shape[-1] % (size * cuts) else -(-local.shard[-1] // size)
    return _STEP_BYTES + codes * elements + 2 * _SCALE_BYTES * own * math.prod(local.shard[:-1])


def adamw_working_bytes(weights: Iterable[LocalWeight], config: OptimizerConfig, itemsize: int) -> int:
    """Bytes that a step of AdamW works on at one time, beside parameters, gradients and state."""
    step = max(itemsize, 4)
    if config.state_dtype == "float32" and step == itemsize:
        return 0  # torch's fused kernel works in place
    most = 0
    for local in weights:
        columns = local.weight.shape[-1]
        rows = math.prod(local.shard[:-1])
        run = min(rows, max(1, _RUN_ELEMENTS // max(1, columns))) * local.shard[-1]
        most = max(most, run)
    return most * step * _WIDE_COPIES[config.state_dtype]


_WIDE_COPIES: Mapping[str, int] = {"float32": 2, "bfloat16": 2, "int8": 4, "int4": 4}
