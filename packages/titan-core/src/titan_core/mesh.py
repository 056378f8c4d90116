"""The device meshes: one world of ranks, seen in three ways.

- `data`: who reads what. Axes pp, dp_replicate, dp_shard, cp, tp.
- `dense`: who holds which part of a parameter. Axes pp, dp_replicate, fsdp, tp; FSDP shards over the ranks of dp_shard
  and of cp alike, since both compute gradients of the same parameters from different tokens.
- `experts`: the same for the weights of experts. Axes pp, dp_replicate, expert_fsdp, ep; ep takes its ranks from
  dp_shard x cp x tp, and FSDP what is left of them.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_core.degrees import Degrees

DATA_AXES = ("dp_replicate", "dp_shard")
# Ranks along these hold different tokens of a global batch, or (pp) none of its loss.
LOSS_AXES = ("pp", "dp_replicate", "dp_shard", "cp")


@dataclass(frozen=True)
class Meshes:
    """The three views of one world; `experts` is None for a model without them."""

    data: DeviceMesh
    dense: DeviceMesh
    experts: DeviceMesh | None
    degrees: Degrees

    def group(self, axis: str) -> ProcessGroup:
        """The ranks along one axis of the data mesh."""
        return self.data.get_group(axis)

    def sequence_groups(self, *, sequence_parallel: bool) -> list[ProcessGroup]:
        """The groups over which the tokens of one row are spread while they pass through a block."""
        axes = ("cp", "tp") if sequence_parallel else ("cp",)
        return [self.group(axis) for axis in axes if self.data[axis].size() > 1]


def build_meshes(degrees: Degrees, device_type: str, *, experts: bool = False) -> Meshes:
    """All ranks laid out as `degrees` say; axes of degree 1 are kept.

    Assumes that the default process group exists and has `degrees.world_size` ranks. `experts`: whether the model
    has any.
    """
    d = degrees
    data = _mesh(device_type, pp=d.pp, dp_replicate=d.dp_replicate, dp_shard=d.dp_shard, cp=d.cp, tp=d.tp)
    inner = d.dp_shard * d.cp
    dense = _mesh(device_type, pp=d.pp, dp_replicate=d.dp_replicate, fsdp=inner, tp=d.tp)
    if not experts:
        return Meshes(data, dense, None, degrees)
    rest = inner * d.tp // d.ep
    expert_mesh = _mesh(device_type, pp=d.pp, dp_replicate=d.dp_replicate, expert_fsdp=rest, ep=d.ep)
    return Meshes(data, dense, expert_mesh, degrees)


def _mesh(device_type: str, **axes: int) -> DeviceMesh:
    return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))


def data_rank(mesh: DeviceMesh) -> int:
    """This rank's number among the ranks that read different rows of a batch; `mesh` is the data mesh."""
    rank = 0
    for axis in DATA_AXES:
        rank = rank * mesh[axis].size() + mesh.get_local_rank(axis)
    return rank


def sum_over(tensor: torch.Tensor, mesh: DeviceMesh, axes: tuple[str, ...] = LOSS_AXES) -> torch.Tensor:
    """Sums `tensor` in place over the ranks along `axes` of the data mesh, and returns it."""
    for axis in axes:
        if mesh[axis].size() > 1:
            dist.all_reduce(tensor, group=mesh.get_group(axis))
    return tensor
