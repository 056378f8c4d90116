"""What the routers of a mixture of experts count together, although each rank sees only some tokens.

Within a micro-batch the counts of a row are summed over the ranks that hold its other tokens; at the end of a step the
load of the global batch is summed over all ranks, and each router moves its bias by it.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from titan_core.roles import ROLES

if TYPE_CHECKING:
    from titan_core.mesh import Meshes


class Routers:
    """The routers of the part of a model that this rank holds."""

    def __init__(
        self,
        model: nn.Module,
        roles: Mapping[str, str],
        meshes: "Meshes | None" = None,
        *,
        sequence_parallel: bool = False,
    ) -> None:
        self._routers: dict[str, Any] = {
            fqn: model.get_submodule(fqn) for fqn, role in roles.items() if ROLES[role].routes
        }
        self._groups: Sequence[ProcessGroup] = ()
        self.loads: dict[str, Tensor] = {}
        """FQN of each router -> tokens that went to each expert in the last step [E], over the global batch."""
        if meshes is None or not self._routers:
            return
        sequence = meshes.sequence_groups(sequence_parallel=sequence_parallel)
        data = [meshes.group(axis) for axis in ("dp_replicate", "dp_shard") if meshes.data[axis].size() > 1]
        self._groups = [*data, *sequence]
        for router in self._routers.values():
            router.sum_over_sequence = partial(_sum, groups=sequence)

    @property
    def counts(self) -> list[Tensor]:
        """What each router has counted on this rank in the step so far, to be changed in place: [E] each."""
        return [router.load for router in self._routers.values()]

    @torch.no_grad()
    def finish_step(self, skip: Tensor | None = None) -> None:
        """Sums the loads of a step over all ranks, lets each router move its bias, and starts to count anew.

        If `skip`, a float32 scalar, is 1.0, no bias moves.
        """
        if not self._routers:
            return
        together = _sum(torch.cat([router.load for router in self._routers.values()]), self._groups)
        sizes = [router.load.numel() for router in self._routers.values()]
        for (fqn, router), load in zip(self._routers.items(), together.split(sizes), strict=True):
            self.loads[fqn] = load
            # Nothing at all is a load that is even.
            router.finish_step(load if skip is None else load.masked_fill(skip > 0, 0))
            router.load.zero_()


def _sum(counts: Tensor, groups: Sequence[ProcessGroup]) -> Tensor:
    for group in groups:
        dist.all_reduce(counts, group=group)
    return counts
