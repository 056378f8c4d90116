"""When a run saves: after so many steps, after so many minutes, after listed steps, and after the last one.

Ranks must decide alike, and their clocks differ. So there are two questions: whether it is time, which rank 0 asks its
own clock, and what to save after a step, which every rank answers for itself from the same facts, one of them being
rank 0's answer to the first. Imports no torch.
"""

import time
from collections.abc import Callable
from typing import Literal, TypeAlias

from titan_ckpt.config import CheckpointConfig

Save: TypeAlias = Literal["permanent", "passing"]


def due(config: CheckpointConfig, step: int, *, is_last: bool, is_time: bool) -> Save | None:
    """What to save after a step; None: nothing.

    Args:
        config: the checkpoint section.
        step: optimizer steps taken.
        is_last: whether the run ends with this step, finished or told to stop.
        is_time: what rank 0's `Timer.is_time` said.
    """
    if not config.enabled:
        return None
    if step in config.permanent_steps or _is_multiple(step, config.permanent_every):
        return "permanent"
    return "passing" if is_last or is_time or _is_multiple(step, config.every) else None


class Timer:
    """The minutes since the last checkpoint, on the rank whose clock counts.

    Args:
        config: the checkpoint section.
        clock: seconds since whenever; never goes backwards.
    """

    def __init__(self, config: CheckpointConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = config.every_minutes * 60
        self._clock = clock
        self._last = clock()

    def is_time(self) -> bool:
        """Whether the next checkpoint is due by time."""
        return 0 < self._seconds <= self._clock() - self._last

    def restart(self) -> None:
        """Counts from now on; called after each save, whatever it was due to."""
        self._last = self._clock()


def _is_multiple(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
