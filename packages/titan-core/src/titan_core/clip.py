"""The gradient's global norm, the same number on every layout, and clipping by it."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from titan_core.shards import is_dtensor, local


def gradient_norm(parameters: Iterable[nn.Parameter], stages: ProcessGroup | None = None) -> Tensor:
    """The Euclidean norm of all gradients together: a scalar in at least float32, equal on all ranks.

    Each element counts once: squares are summed over the mesh dimensions along which a gradient is cut, and not
    over those along which it is replicated. `stages`: the ranks that hold other parameters, in a pipeline.
    """
    parts: dict[tuple[ProcessGroup, ...], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            parts[_groups(parameter.grad)].append(local(parameter.grad))
    squares, wide = [], torch.float32
    for groups, gradients in parts.items():
        wide = torch.promote_types(wide, gradients[0].dtype)
        square = _sum_of_squares(gradients)
        for group in groups:
            dist.all_reduce(square, group=group)
        squares.append(square)
    total = torch.stack(squares).sum()
    if stages is not None:
        dist.all_reduce(total, group=stages)
    return total.sqrt().to(wide)


def _sum_of_squares(gradients: Sequence[Tensor]) -> Tensor:
    """Of all elements together: a scalar, in float64 where the device has it.

    Row by row first: over a large matrix of which few rows are large, as an embedding's is, a sum in float32 loses
    more the longer it is, so that its error would depend on how many ranks the matrix is cut over.
    """
    rows = [
        torch.linalg.vector_norm(g, dim=-1, dtype=torch.promote_types(g.dtype, torch.float32)).flatten()
        for g in gradients
    ]
    exact = torch.float32 if gradients[0].device.type == "mps" else torch.float64
    return torch.cat(rows).to(exact).square().sum()


def _groups(gradient: Tensor) -> tuple[ProcessGroup, ...]:
    """The groups of ranks that hold different parts of `gradient`."""
    if not is_dtensor(gradient):
        return ()
    mesh, placements = gradient.device_mesh, gradient.placements
    # Not is_shard(): a parameter that two axes cut along one dimension has a placement that denies it.
    return tuple(mesh.get_group(i) for i, p in enumerate(placements) if not p.is_replicate() and mesh.size(i) > 1)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, stages: ProcessGroup | None = None) -> Tensor:
    """Scales all gradients by min(1, max_norm / norm) without waiting for the device; returns the norm before.

    `max_norm` 0 leaves the gradients as they are. `stages` as for `gradient_norm`.
    """
    parameters = list(parameters)
    norm = gradient_norm(parameters, stages)
    if max_norm > 0:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameter in parameters:
            if parameter.grad is not None:
                local(parameter.grad).mul_(factor)
    return norm
