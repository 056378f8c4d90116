"""The device mesh: ranks laid out as a grid whose axes are the parallel degrees."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_core.degrees import Degrees

DATA_AXES = ("dp_replicate", "dp_shard")
_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


def build_mesh(degrees: Degrees, device_type: str) -> DeviceMesh:
    """The mesh of all ranks with axes pp, dp_replicate, dp_shard, cp, tp; axes of degree 1 are kept.

    Assumes that the default process group exists and has `degrees.world_size` ranks.
    """
    return init_device_mesh(device_type, tuple(getattr(degrees, axis) for axis in _AXES), mesh_dim_names=_AXES)


def data_rank(mesh: DeviceMesh) -> int:
    """This rank's number among the ranks that read different rows of a batch."""
    rank = 0
    for axis in DATA_AXES:
        rank = rank * mesh[axis].size() + mesh.get_local_rank(axis)
    return rank


def sum_over(tensor: torch.Tensor, mesh: DeviceMesh, axes: tuple[str, ...] = DATA_AXES) -> torch.Tensor:
    """Sums `tensor` in place over the ranks along `axes`, and returns it."""
    for axis in axes:
        if mesh[axis].size() > 1:
            dist.all_reduce(tensor, group=mesh.get_group(axis))
    return tensor
