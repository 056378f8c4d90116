"""Context parallelism, applied: each rank takes its tokens of a batch, and attention sees those of the others."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from titan_core.config import ParallelConfig
from titan_core.context import ContextParallelAttention, shard_sequence
from titan_core.micro_batches import Batch
from titan_core.roles import ROLES
from titan_core.surgery import specialise

if TYPE_CHECKING:
    from titan_core.parallelize import Layout


def apply_context_parallel(
    model: nn.Module, roles: Mapping[str, str], group: ProcessGroup, config: ParallelConfig
) -> None:
    """Lets the attention of every block see the tokens that the ranks of `group` hold."""
    options: dict[str, Any] = {"method": config.cp_method, "load_balance": config.cp_load_balance}

    def members(base: type[nn.Module]) -> dict[str, Any]:
        def forward(self: nn.Module, *arguments: Tensor) -> Tensor:
            return ContextParallelAttention(partial(base.forward, self), group, **options)(*arguments)

        return {"forward": forward}

    for fqn, role in roles.items():
        if ROLES[role].context:
            specialise(model.get_submodule(fqn), ("context", group.group_name, *options.values()), members)


class OwnTokens:
    """A layout whose batches hold whole rows, of which each rank of `group` computes its own tokens."""

    def __init__(self, layout: "Layout", group: ProcessGroup, *, load_balance: bool) -> None:
        self.model = layout.model
        self.routers = layout.routers
        self.gradient_bytes = layout.gradient_bytes
        self._layout = layout
        self._take = partial(shard_sequence, rank=group.rank(), size=group.size(), load_balance=load_balance)

    def accumulate(self, batch: Batch, *, divisor: float) -> Tensor:
        """See `Layout.accumulate`; what has a value for each token is cut, what has one for each row is not."""
        own = {name: self._take(tensor) if tensor.dim() > 1 else tensor for name, tensor in batch.items()}
        return self._layout.accumulate(own, divisor=divisor)
