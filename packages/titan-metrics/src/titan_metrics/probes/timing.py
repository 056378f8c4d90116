"""How long something takes on a device: repeated, with the device's queue empty before and after."""

import statistics
import time
from collections.abc import Callable

import torch

_WARMUP = 2  # the first calls choose kernels, make connections and touch memory for the first time


def median_seconds(
    action: Callable[[], object],
    device: torch.device,
    *,
    repetitions: int,
    before: Callable[[], object] = lambda: None,
) -> float:
    """The median time of `action`, in seconds.

    Args:
        action: what is measured.
        device: on which it runs.
        repetitions: how often, at least once.
        before: called before each of them, and not measured: for example what makes ranks begin together.
    """
    times = []
    for _ in range(_WARMUP + repetitions):
        before()
        _finish(device)
        started = time.perf_counter()
        action()
        _finish(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[_WARMUP:])


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
