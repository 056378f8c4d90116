"""The door for rewrites of a model, low precision or LoRA say, into tensor parallelism: what they do otherwise."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor
from torch.distributed import ProcessGroup

from titan_core.roles import ROLES


class Collective(Protocol):
    """Differentiable, like those of `titan_core.collectives`."""

    def __call__(self, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        """What this rank has afterwards."""
        ...


class TensorStyleError(ValueError):
    """A rewrite wants something of tensor parallelism where there is nothing to change."""


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

    def check(self, roles: Mapping[str, str]) -> None:
        """Refuses names that stand for nothing; `roles` are those of the whole model, as `resolve_roles` returns them.

        Raises:
            TensorStyleError: naming what fits no region, no row-cut layer, or no role that can have parameters added.
        """
        for names, style, said in (
            (self.entered, "region", "entered names {}, and the model has no region"),
            (self.left, "row", "left names {}, and the model has no row-cut layer"),
        ):
            known = {fqn for fqn, role in roles.items() if ROLES[role].tensor == style}
            if strangers := sorted(set(names) - known):
                raise TensorStyleError(
                    f"TensorStyles.{said.format(', '.join(strangers))} of that name. "
                    "Give whole names, without patterns."
                )
        if strangers := sorted(self.added.keys() - {"colwise", "rowwise"}):
            raise TensorStyleError(f"TensorStyles.added has {', '.join(strangers)}; give colwise, rowwise or both.")


AS_USUAL = TensorStyles()
