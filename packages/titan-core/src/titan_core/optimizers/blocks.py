"""Blocks along the rows of a parameter that share a scale, the same ones on every layout.

A parameter [..., columns] is seen as rows. Each row is cut into as few blocks of equal size as keep to a largest size;
the last one of a row may be shorter. Which elements share a block, and so their scale, follows from the global shape.

Ranks may cut the rows too, as tensor parallelism does. Where they cut between blocks, each has the scales of its own.
Where they cut a block, its scale is the largest that any of its ranks finds: they exchange them, which is one number
for each block, and each keeps the scales of the whole row.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from titan_core.shards import is_dtensor, local, owned

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def as_rows(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor` as a view [rows, columns] of it; a vector is one row."""
    part = local(tensor)
    return part.view(math.prod(part.shape[:-1]), part.shape[-1]) if part.ndim else part.view(1, 1)


def row_numbers(tensor: Tensor) -> Tensor:
    """The number of each of this rank's rows among the rows of the whole `tensor`: int64 [rows], on its device."""
    numbers = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for size, part in zip(tensor.shape[:-1], owned(tensor)[:-1], strict=True):
        along = torch.arange(part.start, part.stop, device=tensor.device)
        numbers = numbers[..., None] * size + along
    return numbers.flatten()


class Blocks:
    """The blocks of one parameter, at least a matrix, as this rank sees them.

    All ranks that have parts of a row ask for its scales together.
    """

    def __init__(self, parameter: Tensor, largest: int) -> None:
        """`largest`: the most columns of a block."""
        self._parameter = parameter
        columns, own = parameter.shape[-1], owned(parameter)[-1]
        self._size = -(-columns // -(-columns // largest))
        first, end = own.start // self._size, -(-own.stop // self._size)
        self._own = slice(first, end)
        self._missing = own.start - first * self._size, end * self._size - own.stop
        self._row_blocks = -(-columns // self._size)
        # Of the mesh axes that cut blocks: the ranks that share them.
        self._groups: dict[int, ProcessGroup] = {}
        if is_dtensor(parameter):
            mesh, axes = parameter.device_mesh, _axes_along_rows(parameter)
            if columns % (self._size * math.prod(mesh.size(axis) for axis in axes)):
                self._groups = {axis: mesh.get_group(axis) for axis in axes}

    def new_scales(self) -> Tensor:
        """Zeros, a float32 for each block [..., blocks of a row], spread over ranks as the parameter is."""
        parameter = self._parameter
        width = self._row_blocks if self._groups else self._own.stop - self._own.start
        shape = (*local(parameter).shape[:-1], width)
        if not is_dtensor(parameter):
            return torch.zeros(shape, device=parameter.device)
        from torch.distributed.tensor import DTensor, Replicate

        mesh, whole = parameter.device_mesh, (*parameter.shape[:-1], self._row_blocks)
        placements = [Replicate() if i in self._groups else p for i, p in enumerate(parameter.placements)]
        zeros, stride = torch.zeros(shape, device=mesh.device_type), torch.empty(whole, device="meta").stride()
        spread = DTensor.from_local(zeros, mesh, placements, run_check=False, shape=torch.Size(whole), stride=stride)
        return torch.zeros_like(spread, device=parameter.device)  # which is the host if FSDP offloads

    def cut(self, x: Tensor) -> Tensor:
        """Rows [n, columns of this rank] as [n, blocks, size], with zeros for what other ranks have of a block."""
        if any(self._missing):
            x = F.pad(x, self._missing)
        return x.view(x.shape[0], self._own.stop - self._own.start, self._size)

    def join(self, blocks: Tensor) -> Tensor:
        """The inverse of `cut`."""
        before, after = self._missing
        x = blocks.flatten(1)
        return x[:, before : x.shape[1] - after]

    def find_scales(self, blocks: Tensor) -> Tensor:
        """The largest absolute value of each block, on any rank: float32 [n, blocks], those that `new_scales` has."""
        found = blocks.abs().amax(-1).to(torch.float32)
        if not self._groups:
            return found
        # A maximum over ranks may lose a NaN, but not what is infinite.
        scales = found.new_zeros(len(found), self._row_blocks)
        scales[:, self._own] = found.nan_to_num_(nan=math.inf)
        for group in self._groups.values():
            dist.all_reduce(scales, dist.ReduceOp.MAX, group)
        return scales

    def own(self, scales: Tensor) -> Tensor:
        """Of `scales` [n, ...] as `find_scales` returns them those of this rank's blocks, to multiply blocks with."""
        return (scales[:, self._own] if self._groups else scales)[..., None]


def _axes_along_rows(parameter: "DTensor") -> list[int]:
    """The mesh axes that cut the rows of `parameter`."""
    placements: Sequence[Any] = parameter.placements
    # Not is_shard(): a parameter that two axes cut along one dimension has a placement that denies it.
    return [i for i, p in enumerate(placements) if not p.is_replicate() and p.dim == parameter.ndim - 1]
