"""How fast the ranks of a process group send to each other.

Bandwidths are bus bandwidths, as nccl-tests defines them (https://github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md):
the bytes of the largest buffer on a rank, divided by the time, times a factor that makes the number that of the
slowest link, whatever the operation and the number of ranks:

    all_reduce                             2 (n - 1) / n
    all_gather, reduce_scatter, all_to_all   (n - 1) / n
    send_recv                                1

Ranks begin together, so that nobody's time includes waiting for one that comes late.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from titan_metrics.probes.timing import median_seconds

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)


def bus_factor(operation: Operation, ranks: int) -> float:
    """What turns the bytes of the largest buffer, divided by seconds, into the bandwidth of the slowest link."""
    if operation == "send_recv":
        return 1.0
    return (ranks - 1) / ranks * (2 if operation == "all_reduce" else 1)


def bus_bandwidth(
    operation: Operation, group: ProcessGroup, device: torch.device, *, num_bytes: int, repetitions: int
) -> float:
    """Bus bandwidth in bytes a second, by this rank's median time.

    All ranks of `group`, at least two, must call it alike. With `send_recv` each sends to the next, and receives from
    the one before, at the same time.

    Args:
        operation: a collective, or `send_recv`.
        group: the ranks that take part.
        device: where the buffers are; the group must have a backend for it.
        num_bytes: of the largest buffer on a rank: what all_gather returns, what reduce_scatter takes, what is sent
            otherwise. Rounded down to whole float32 for each rank, at least one.
        repetitions: how often it is measured.
    """
    ranks = group.size()
    share = max(num_bytes // (4 * ranks), 1)
    whole, other = torch.ones(share * ranks, device=device), torch.ones(share * ranks, device=device)
    signal = torch.zeros(1, device=device)
    seconds = median_seconds(
        exchange(operation, group, whole, other),
        device,
        repetitions=repetitions,
        before=lambda: dist.all_reduce(signal, group=group),
    )
    return whole.nbytes * bus_factor(operation, ranks) / seconds


def exchange(
    operation: Operation, group: ProcessGroup, whole: torch.Tensor, other: torch.Tensor
) -> Callable[[], object]:
    """What does `operation` once, when it is called on all ranks of `group`.

    Args:
        operation: all_reduce takes the greatest, since a sum that is repeated would overflow; reduce_scatter the sum.
        group: of n ranks.
        whole: [n P], where all_reduce and all_gather leave what they make, and the others take what they send.
        other: [n P], where the others leave what they make (reduce_scatter: in the first P), and where all_gather
            takes its P from.
    """
    part = other[: whole.numel() // group.size()]
    if operation == "all_reduce":
        return lambda: dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=group)
    if operation == "all_gather":
        return lambda: dist.all_gather_single(whole, part, group=group)
    if operation == "reduce_scatter":
        return lambda: dist.reduce_scatter_single(part, whole, group=group)
    if operation == "all_to_all":
        return lambda: dist.all_to_all_single(other, whole, group=group)
    members = dist.get_process_group_ranks(group)
    here = group.rank()
    after, before = members[(here + 1) % len(members)], members[here - 1]

    def pass_on() -> None:
        messages = [dist.P2POp(dist.isend, whole, after, group), dist.P2POp(dist.irecv, other, before, group)]
        for work in dist.batch_isend_irecv(messages):
            work.wait()

    return pass_on
