"""Time that this process waits for other ranks, told to the spans that are open.

In a step of synchronous training all ranks take equally long: whoever is late is waited for. What tells the slow one
from the others is the time that each spends waiting. It is measured where the host waits, in `Work.wait`, which all of
torch.distributed's Python functions, FSDP's among them, call: that is the whole truth with gloo, and nothing with NCCL,
where the device waits. Functional collectives, which DTensor and compiled code use, wait elsewhere and are not seen.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from titan_metrics.spans import Spans


@contextlib.contextmanager
def timed_waits(spans: Spans) -> Iterator[None]:
    """Within it, whatever thread waits for a collective or for a message says so to its open spans."""
    real = dist.Work.wait

    def wait(work: dist.Work, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return real(work, *arguments, **options)
        finally:
            spans.wait(time.perf_counter() - start)

    dist.Work.wait = wait
    try:
        yield
    finally:
        dist.Work.wait = real


def measure_clock_offset(group: dist.ProcessGroup | None = None, rounds: int = 9) -> float:
    """How many seconds this host's clock is ahead of that of the group's first rank; every rank must call it.

    The median over some barriers, which all ranks leave at about the same time: right within a millisecond or so.
    """
    import torch

    times = torch.zeros(rounds, dtype=torch.float64)
    for i in range(rounds):
        dist.barrier(group)
        times[i] = time.time()
    gathered = [torch.zeros_like(times) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, times, group=group)
    return float((times - gathered[0]).median())
