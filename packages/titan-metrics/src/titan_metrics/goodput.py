"""Where a run's time went, across all of its starts: how much of it moved the model forward.

A `Ledger` appends events to a file; `goodput` adds them up. An event is

    {"event": …, "time": seconds since the Unix epoch, "step": …, "seconds": …, "run": which start, …}

| event | when | `step` | `seconds` |
|---|---|---|---|
| `start` | the process begins | | |
| `ready` | the first step is about to begin | the step restored, 0 for a new run | |
| `step` | now and then while training | the newest step | spent in steps since the last such event |
| `save`, `restore`, `validate`, `compile`, `data` | after each | | that training waited for it |
| `end` | the process ends | the last step | |

Time between the last event of one start and the next `start` is down time: a killed process cannot say when it died.
Steps that a later start does again were lost; their time counts as redone, not as useful, where it was spent again.
"""

import contextlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from titan_metrics.spans import open_jsonl

_log = logging.getLogger(__name__)

_TIMED = {"save": "save", "restore": "restore", "validate": "validate", "compile": "compile", "data": "data"}
PARTS = ("useful", "redone", "start", "compile", "restore", "data", "validate", "save", "down", "other")
"""What `goodput` divides the time into."""


class Ledger:
    """Appends the events of one start of a run to a file that all its starts share; one rank should have it.

    A file that cannot be written costs one warning, and never the run.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._run = uuid.uuid4().hex[:12]
        self._file: IO[str] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_jsonl(path)
        except OSError as error:
            self._give_up(error)

    def record(self, event: str, *, step: int | None = None, seconds: float | None = None, **more: object) -> None:
        """Writes one event, and hands it to the operating system."""
        if self._file is None:
            return
        line = {"event": event, "time": self._clock(), "step": step, "seconds": seconds, "run": self._run, **more}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _give_up(self, error: OSError) -> None:
        _log.warning("The goodput ledger is not written in this run: %s", error)
        with contextlib.suppress(OSError):
            self.close()
        self._file = None


def goodput(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The shares of a run's time, 0 to 1, from its first event to its last: `useful`, `redone`, … (`PARTS`).

    `other` is what no event accounts for, such as logging. They sum to 1; empty if there is no time to share.
    """
    starts = _by_start(events)
    if not starts or starts[-1][-1]["time"] <= starts[0][0]["time"]:
        return {}
    seconds = dict.fromkeys(PARTS, 0.0)
    furthest, ended = 0, starts[0][0]["time"]
    for start in starts:
        seconds["down"] += max(start[0]["time"] - ended, 0.0)
        ended = start[-1]["time"]
        furthest = _add_start(start, furthest, seconds)
    total = ended - starts[0][0]["time"]
    seconds["other"] = max(total - sum(seconds.values()), 0.0)
    total = max(total, sum(seconds.values()))  # rounding, or steps that overlap with a save
    return {part: value / total for part, value in seconds.items()}


def _by_start(events: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    starts: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        starts.setdefault(event["run"], []).append(event)
    return list(starts.values())


def _add_start(events: list[Mapping[str, Any]], furthest: int, seconds: dict[str, float]) -> int:
    """Adds one start's seconds; returns the furthest step that the run has ever reached."""
    done = 0
    for i, event in enumerate(events):
        kind, taken = event["event"], event["seconds"] or 0.0
        if kind == "ready":
            done = event["step"] or 0
            before = sum(earlier["seconds"] or 0.0 for earlier in events[:i])
            seconds["start"] += max(event["time"] - events[0]["time"] - before, 0.0)
        elif kind == "step":
            steps = max(event["step"] - done, 1)
            again = min(max(furthest - done, 0), steps) / steps
            seconds["redone"] += taken * again
            seconds["useful"] += taken * (1 - again)
            done = event["step"]
        elif kind in _TIMED:
            seconds[_TIMED[kind]] += taken
    return max(furthest, done)
