"""Whether ranks that should hold the same numbers do: a checksum of every copy, compared bit by bit.

Copies drift apart by a missing exchange, by arithmetic that is not deterministic, or by a broken device, and training
goes on with a model that exists on no rank. Copies are parameters that are not DTensors, on all ranks that have one of
the name, and parts of a DTensor with the same place in it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_metrics.norms import local

_CHUNK = 1 << 20  # elements hashed at a time, so that a checksum takes a few MB of memory


@dataclass(frozen=True)
class Disagreement:
    """A tensor of which ranks hold different copies."""

    fqn: str
    ranks: tuple[int, ...]
    """The ranks in the minority; of two copies, the rank with the higher number."""
    of: tuple[int, ...]
    """All ranks that hold this part of it."""

    def __str__(self) -> str:
        return f"{self.fqn} on rank {', '.join(map(str, self.ranks))} (copies on {', '.join(map(str, self.of))})"


class ReplicasDifferError(RuntimeError):
    """Ranks hold different copies of the same tensors."""

    def __init__(self, found: list[Disagreement]) -> None:
        self.found = found
        shown = "; ".join(map(str, found[:8])) + ("; …" if len(found) > 8 else "")
        super().__init__(
            f"{len(found)} tensors differ between ranks that should hold the same: {shown}. One rank alone points to "
            "its device; all of them to a reduction that is missing or not deterministic. Go on from a checkpoint of "
            "before it."
        )


def check_replicas(tensors: Iterable[tuple[str, Tensor]], group: dist.ProcessGroup | None = None) -> None:
    """Compares this rank's tensors, by FQN, with those of the other ranks of `group` (None: all); all must call it.

    Raises:
        ReplicasDifferError: on every rank alike, if copies differ.
    """
    own = {(fqn, _place(tensor)): checksum(local(tensor)) for fqn, tensor in tensors}
    sums = torch.stack(list(own.values())).tolist() if own else []
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, dict(zip(own, sums, strict=True)), group=group)
    ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    copies: dict[tuple[str, Any], dict[int, int]] = defaultdict(dict)
    for rank, part in zip(ranks, parts, strict=True):
        for key, value in part.items():
            copies[key][rank] = value
    found = []
    for (fqn, _), by_rank in copies.items():
        usual = Counter(by_rank.values()).most_common(1)[0][0]
        if odd := tuple(rank for rank, value in by_rank.items() if value != usual):
            found.append(Disagreement(fqn, odd, tuple(by_rank)))
    if found:
        raise ReplicasDifferError(found)


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """A number that changes with any bit of `tensor`, and with the order of its elements: int64, on its device.

    The sum of (bits of an element) x (an odd number that belongs to its place), modulo 2^64: a change of one element
    always shows.
    """
    whole = torch.int64 if tensor.element_size() == 8 else torch.int32 if tensor.element_size() == 4 else torch.int16
    bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8 if tensor.element_size() == 1 else whole)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start, start + part.numel(), dtype=torch.int64, device=tensor.device)
        # An odd multiplier, spread over all bits so that neighbours do not weigh nearly the same.
        total += (part * ((places * 0x9E3779B97F4A7C1 * 2) | 1)).sum()
    return total


def _place(tensor: Any) -> tuple[int, ...] | None:
    """The place of this rank's part in a DTensor, on the mesh axes that cut it; None for a tensor that is whole."""
    if not hasattr(tensor, "device_mesh"):
        return None
    mesh = tensor.device_mesh
    return tuple(mesh.get_local_rank(i) for i, p in enumerate(tensor.placements) if not p.is_replicate())
