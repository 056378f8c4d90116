"""Which part of a parameter this rank holds, for plain tensors and DTensors alike.

DTensor costs most of a second to import, so nothing here imports it before one is met.
"""

from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether `tensor` is spread over a device mesh."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`: its shard if it is a DTensor, else the tensor itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def owned(tensor: Tensor) -> tuple[slice, ...]:
    """Where this rank's part lies in the whole tensor: one slice a dimension."""
    if not is_dtensor(tensor):
        return tuple(slice(0, size) for size in tensor.shape)
    from titan_core.compat import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def unsharded_size(tensor: Tensor, *axes: str) -> int:
    """Elements of this rank's part of `tensor` if it were whole along the mesh `axes`."""
    if not is_dtensor(tensor):
        return tensor.numel()
    names = tensor.device_mesh.mesh_dim_names or ()
    cut = 1
    for i, placement in enumerate(tensor.placements):
        if not placement.is_replicate() and names[i] not in axes:
            cut *= tensor.device_mesh.size(i)
    return tensor.numel() // cut
