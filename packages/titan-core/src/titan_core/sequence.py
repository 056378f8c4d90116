"""Context parallelism, applied: each rank takes its tokens of a batch, and attention sees those of the others."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from titan_core.config import ParallelConfig
from titan_core.context import ContextParallelAttention, shard_sequence
from titan_core.layout import Batch, Layout
from titan_core.mesh import Meshes
from titan_core.roles import ROLES
from titan_core.surgery import specialise


def apply_context_parallel(model: nn.Module, roles: Mapping[str, str], meshes: Meshes, config: ParallelConfig) -> None:
    """Lets the attention of every block see the tokens that the other cp ranks hold."""
    if meshes.degrees.cp == 1:
        return
    group = meshes.group("cp")
    options: dict[str, Any] = {"method": config.cp_method, "load_balance": config.cp_load_balance}

    def members(base: type[nn.Module]) -> dict[str, Any]:
        def forward(self: nn.Module, *arguments: Tensor) -> Tensor:
            return ContextParallelAttention(partial(base.forward, self), group, **options)(*arguments)

        return {"forward": forward}

    for fqn, role in roles.items():
        if ROLES[role].context:
            specialise(model.get_submodule(fqn), ("context", group, *options.values()), members)


class OwnTokens:
    """A layout whose batches hold whole rows, of which each cp rank computes its own tokens."""

    def __init__(self, layout: Layout, meshes: Meshes, config: ParallelConfig) -> None:
        group = meshes.group("cp")
        self.model = layout.model
        self.routers = layout.routers
        self.gradient_bytes = layout.gradient_bytes
        self.watch = layout.watch
        self._layout = layout
        self._take = partial(shard_sequence, rank=group.rank(), size=group.size(), load_balance=config.cp_load_balance)

    def accumulate(self, batch: Batch, *, divisor: float) -> Tensor:
        """See `Layout.accumulate`; what has a value for each token is cut, what has one for each row is not."""
        return self._layout.accumulate(self._own(batch), divisor=divisor)

    def evaluate(self, batch: Batch) -> Tensor:
        """See `Layout.evaluate`."""
        return self._layout.evaluate(self._own(batch))

    def _own(self, batch: Batch) -> Batch:
        return {name: self._take(tensor) if tensor.dim() > 1 else tensor for name, tensor in batch.items()}
