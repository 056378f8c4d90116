"""The door for rewrites of a model, low precision or LoRA say, into tensor parallelism: what they do otherwise."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor
from torch.distributed import ProcessGroup


class Collective(Protocol):
    """Differentiable, like those of `titan_core.collectives`."""

    def __call__(self, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        """What this rank has afterwards."""
        ...


@dataclass(frozen=True, kw_only=True)
class TensorStyles:
    """Nothing else than usual by default."""

    entered: Collection[str] = ()
    """FQNs of regions whose input `gather` collects, if the sequence is cut between regions."""
    left: Collection[str] = ()
    """FQNs of row-cut layers whose output `scatter_sum` sums, if the sequence is cut between regions."""
    gather: Collective | None = None
    """Instead of `titan_core.collectives.gather`."""
    scatter_sum: Collective | None = None
    """Instead of `titan_core.collectives.scatter_sum`."""
    added: Mapping[str, Mapping[str, int | None]] = field(default_factory=dict)
    """Role (`colwise` or `rowwise`) -> name of a parameter that such layers got -> the dimension that is cut; None:
    every rank has it whole and applies it to its own part of the inner dimension."""


AS_USUAL = TensorStyles()
