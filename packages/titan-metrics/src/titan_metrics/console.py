"""Progress of a run for the person who watches it: a bar on a terminal, plain lines in a log file.

Shown are the loss, gradient norm, learning rate, throughput, MFU and memory where they were logged, and whatever
other values the caller logs. Details that belong to a record rather than to a glance are left out: the parts of
throughput, time and memory, and the norms and learning rates of single layers and groups.

A terminal gets colours unless the environment has `NO_COLOR` (https://no-color.org).
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

_FORMATS: Mapping[str, Callable[[float], str]] = {
    "loss": "loss {:.4f}".format,
    "grad_norm": "grad {:.3g}".format,
    "lr": "lr {:.1e}".format,
    "tokens_per_second": "{:,.0f} tok/s".format,
    "mfu": "mfu {:.1%}".format,
    "memory.peak": lambda value: f"mem {value / 2**30:.1f} GiB",
}
_DETAIL_GROUPS = ("allocator.", "lr.", "memory.", "norms.", "time.")
_DETAILS = {
    "step_seconds",
    "data_wait_share",
    "tflops_per_device",
    "tokens",
    "tokens_per_second_per_device",
}
_NOT_ON_THE_BAR = {"grad_norm", "lr"}  # the bar is one line of the terminal and has to leave room for itself
_ETA_LINES = 20  # the time left follows the speed over this many logged lines


class ConsoleSink:
    """Shows progress towards `total_steps`: a live bar if `stream` is a terminal, else one line a logged step.

    Args:
        total_steps: the step at which the run ends.
        first_step: the step that the run starts after: 0, or the step it was resumed from.
        stream: where to write; standard output if None.
        clock: seconds from any fixed point, never going back.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = sys.stdout if stream is None else stream
        self._total = total_steps
        self._clock = clock
        self._seen = deque([(clock(), first_step)], maxlen=_ETA_LINES + 1)
        animate = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._display = _Bar(stream, total_steps, first_step) if animate else _Lines(stream, total_steps)

    def log(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Shows these values as the state of the run after `step` steps."""
        if step > self._seen[-1][1]:
            self._seen.append((self._clock(), step))
        self._display.show(step, values, self._eta())

    def close(self) -> None:
        """Leaves the last state on the screen and gives the terminal back."""
        self._display.close()

    def _eta(self) -> str:
        (then, first), (now, step) = self._seen[0], self._seen[-1]
        if step == first or step >= self._total:
            return ""
        return f"eta {timedelta(seconds=round((now - then) / (step - first) * (self._total - step)))}"


class _Lines:
    def __init__(self, stream: TextIO, total_steps: int) -> None:
        self._stream = stream
        self._total = total_steps

    def show(self, step: int, values: Mapping[str, float | int | str], eta: str) -> None:
        self._stream.write(_joined(f"step {step}/{self._total}", *_known(values), *_others(values), eta) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing to give back: the stream is the caller's."""


class _Bar:
    """A rich progress bar without its refreshing thread: it is drawn when something is logged, and only then."""

    def __init__(self, stream: TextIO, total_steps: int, first_step: int) -> None:
        self._latest: dict[str, float | int | str] = {}
        self._progress = _progress(stream)
        self._task = self._progress.add_task("", total=total_steps, completed=first_step, status="")
        self._progress.start()

    def show(self, step: int, values: Mapping[str, float | int | str], eta: str) -> None:
        self._latest.update(values)  # a line about something else, such as validation, must not blank the loss
        shown = {key: value for key, value in self._latest.items() if key not in _NOT_ON_THE_BAR}
        status = _joined(*_known(shown), eta, *_others(shown))  # what does not fit is cut off at the end
        self._progress.update(self._task, completed=step, status=status, refresh=True)

    def close(self) -> None:
        self._progress.stop()


def _progress(stream: TextIO) -> "Progress":
    from rich.console import Console  # takes 0.15 s, which a run without a terminal need not wait for
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[status]}", markup=False),
        console=Console(file=stream),
        auto_refresh=False,
        expand=True,
    )


def _known(values: Mapping[str, float | int | str]) -> list[str]:
    return [show(float(values[key])) for key, show in _FORMATS.items() if key in values]


def _others(values: Mapping[str, float | int | str]) -> list[str]:
    return [
        f"{key} {value}" if isinstance(value, str) else f"{key} {value:.4g}"
        for key, value in values.items()
        if key not in _FORMATS and key not in _DETAILS and not key.startswith(_DETAIL_GROUPS)
    ]


def _joined(*parts: str) -> str:
    return "  ".join(part for part in parts if part)
