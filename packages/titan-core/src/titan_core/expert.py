"""Expert parallelism: each rank of the ep axis holds some of the experts, and tokens travel to theirs and back.

The ep ranks are taken from dp_shard x cp x tp, all of which hold different tokens, so every token is sent once. Nothing
is dropped: how many rows a rank receives follows from the routing, and the counts are exchanged first.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from titan_core.collectives import all_to_all, permute
from titan_core.compat import is_fake
from titan_core.mesh import Meshes
from titan_core.roles import ROLES
from titan_core.surgery import local_parameter, specialise


def apply_expert_parallel(model: nn.Module, roles: Mapping[str, str], meshes: Meshes) -> None:
    """Spreads the experts of `model` over the ep ranks, which must divide their number."""
    if meshes.experts is None or meshes.degrees.ep == 1:
        return
    for fqn, role in roles.items():
        if ROLES[role].expert:
            spread_experts(model.get_submodule(fqn), meshes.experts["ep"])


def spread_experts(module: nn.Module, ep: DeviceMesh) -> None:
    """Cuts the parameters of `module` (role `experts`) along their first dimension over the 1-D mesh `ep`."""
    group = ep.get_group()
    for name, parameter in list(module.named_parameters(recurse=False)):
        cut = distribute_tensor(parameter.data, ep, [Shard(0)], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(cut, parameter.requires_grad))
    names = tuple(module._parameters)

    def members(base: type[nn.Module]) -> dict[str, Any]:
        def forward(self: nn.Module, x: Tensor, counts: Tensor) -> Tensor:
            """`x` [T, D] sorted by expert, `counts` [E] int64 over all experts -> [T, D] in the same order."""
            to_ranks = counts.view(group.size(), -1)
            equal = [1] * group.size()
            from_ranks = all_to_all(to_ranks, equal, equal, group)
            sent, received = _message_sizes(to_ranks, from_ranks, x.shape[0])
            arrived = all_to_all(x, received, sent, group)
            # They arrive by sending rank, then by expert.
            experts = torch.arange(from_ranks.shape[1], device=x.device).expand_as(from_ranks)
            order = (
                experts.flatten()
                .repeat_interleave(from_ranks.flatten(), output_size=sum(received))
                .argsort(stable=True)
            )
            inverse = order.argsort()
            computed = base.forward(self, permute(arrived, order, inverse), from_ranks.sum(0))
            return all_to_all(permute(computed, inverse, order), sent, received, group)

        return {"forward": forward} | {name: local_parameter(name) for name in names}

    specialise(module, ("experts", group), members)


def _message_sizes(to_ranks: Tensor, from_ranks: Tensor, rows: int) -> tuple[list[int], list[int]]:
    """How many rows go to each rank and come from it, by their counts [ranks, experts]; all that go are `rows`."""
    if is_fake(to_ranks):  # without values: as if the router dealt evenly
        ranks = to_ranks.shape[0]
        even = [rows * (rank + 1) // ranks - rows * rank // ranks for rank in range(ranks)]
        return even, even
    # The host must know; both sums cross over together.
    sent, received = torch.stack((to_ranks.sum(1), from_ranks.sum(1))).tolist()
    return sent, received
