"""How far the clocks of ranks are apart, by exchanging the time with rank 0.

What NTP does (RFC 5905, section 8): rank 0 notes its time t0 and sends, the other notes t1 when it receives and t2 when
it answers, rank 0 notes t3. If the way takes as long as the way back, the other's clock is ahead by

    ((t1 - t0) + (t2 - t3)) / 2

and however the delay is shared out, by at most half of (t3 - t0) - (t2 - t1) more or less. Of several exchanges the one
with the least delay counts. Timelines of several hosts, and logs, are in order only as far as clocks agree.

A run that starts uses `titan_metrics.waits.measure_clock_offset`: all ranks at once, and without such a bound.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ClockOffset:
    """How far a rank's clock is ahead of rank 0's."""

    seconds: float
    """Negative if it is behind."""
    error: float
    """It is right within so many seconds."""


def clock_offsets(*, exchanges: int = 16, clock: Callable[[], int] = time.time_ns) -> list[ClockOffset]:
    """The clocks of all ranks, in rank order, compared with that of rank 0; all ranks get the same list.

    All ranks of the default process group call it; the group must have a backend for the CPU. Ranks take turns: it
    takes about a millisecond for each.

    Args:
        exchanges: how many with each rank.
        clock: the time in nanoseconds since the Unix epoch.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found = torch.zeros(world_size, 2, dtype=torch.float64)
    for other in range(1, world_size):
        if rank == 0:
            best = min((_ask(other, clock) for _ in range(exchanges)), key=lambda offset: offset.error)
            found[other] = torch.tensor([best.seconds, best.error], dtype=torch.float64)
        elif rank == other:
            for _ in range(exchanges):
                _answer(clock)
    dist.broadcast(found, src=0)
    return [ClockOffset(seconds, error) for seconds, error in found.tolist()]


def _ask(other: int, clock: Callable[[], int]) -> ClockOffset:
    times = torch.zeros(2, dtype=torch.int64)
    sent = clock()
    dist.send(times, other)
    dist.recv(times, other)
    back = clock()
    received, answered = times.tolist()
    ahead = ((received - sent) + (answered - back)) / 2
    delay = (back - sent) - (answered - received)
    return ClockOffset(ahead / 1e9, delay / 2 / 1e9)


def _answer(clock: Callable[[], int]) -> None:
    times = torch.zeros(2, dtype=torch.int64)
    dist.recv(times, 0)
    received = clock()
    dist.send(torch.tensor([received, clock()]), 0)
