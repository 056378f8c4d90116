"""A run directory as the page sees it, read whole once and then followed while it grows.

Every file may be missing: the page says so. Steps are whole numbers and rise within `metrics.jsonl`, since a resumed
run moves the lines it will write again to `metrics.redone.jsonl`.
"""

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from titan_metrics.report.curve import Curve
from titan_metrics.report.files import JsonLines, ReportError, read_object
from titan_metrics.report.spans import RunSpans

EXPECTED = {
    "metrics.jsonl": "no curves",
    "config.json": "no configuration",
    "environment.json": "no environment",
    "status.json": "whether the run still goes on is not known",
    "goodput.jsonl": "no goodput",
    "spans": "no timeline",
}
"""What a run directory may hold -> what the page lacks without it."""

_NOT_CURVES = ("step", "time", "tokens")
_INFERRED = 256  # buckets of a curve in which checkpoints are looked for


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Something that happened at a step: a checkpoint was saved, or the run was started again."""

    step: float
    kind: str
    """`checkpoint` or `restart`."""
    text: str


class Run:
    """One run: `curves` by metric, the steps' `tokens` and `times`, what its other files hold, and its `marks`.

    Args:
        directory: the run directory.
        name: what the page calls it.
        window: the steps whose spans are wanted, first and last; None for the latest.

    Raises:
        ReportError: if there is no such directory, or nothing of a run in it.
    """

    def __init__(self, directory: Path, name: str, window: tuple[int, int] | None = None) -> None:
        self.directory = directory
        self.name = name
        self._metrics = JsonLines(directory / "metrics.jsonl")
        self._redone = JsonLines(directory / "metrics.redone.jsonl")
        self._ledger = JsonLines(directory / "goodput.jsonl")
        self._window = window
        self._forget_metrics()
        self._forget_redone()
        self._forget_ledger()
        _check_is_run(directory)
        self.refresh()

    def _forget_metrics(self) -> None:
        self.curves: dict[str, Curve] = {}
        self.tokens, self.times = Curve(), Curve()
        self.steps = Curve()
        self._phases: set[str] = set()

    def _forget_redone(self) -> None:
        self.redone_steps: list[int] = []

    def _forget_ledger(self) -> None:
        self.events: list[dict[str, Any]] = []

    def refresh(self) -> None:
        """Reads what was written since the last call.

        Raises:
            ReportError: if a file is not what it should be.
        """
        if self._metrics.replaced():
            self._forget_metrics()
        for record in self._metrics.new():
            self._add(record)
        if self._redone.replaced():
            self._forget_redone()
        self.redone_steps += [step for record in self._redone.new() if isinstance(step := record.get("step"), int)]
        if self._ledger.replaced():
            self._forget_ledger()
        for event in self._ledger.new():
            _check_event(event, self._ledger.path)
            self.events.append(event)
        self.config = read_object(self.directory / "config.json")
        self.environment = self._environment()
        self.status = read_object(self.directory / "status.json")
        self.spans = RunSpans.read(self.directory / "spans", self._window)
        self.missing = [name for name in EXPECTED if not (self.directory / name).exists()]

    def _environment(self) -> dict[str, Any] | None:
        """None also if it is damaged: the rest of the page says enough without it."""
        self.damaged = []
        try:
            return read_object(self.directory / "environment.json")
        except ReportError:
            self.damaged.append("environment.json")
            return None

    def stamp(self) -> list[tuple[str, int, int]]:
        """What changes when any of the run's files does: name, size, and time of the last change."""
        found = []
        for path in [
            *(self.directory / name for name in EXPECTED),
            *sorted((self.directory / "spans").glob("*.jsonl")),
        ]:
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((path.name, status.st_size, status.st_mtime_ns))
        return found

    def _add(self, record: dict[str, Any]) -> None:
        step = record.get("step")
        if not isinstance(step, int):
            raise ReportError(
                f"A line of {self._metrics.path} has no whole `step` (it has {step!r}). Remove the line, or report on "
                "a folder whose metrics.jsonl was written by titan-metrics."
            )
        self.steps.add(step, step)
        for curve, name in ((self.tokens, "tokens"), (self.times, "time")):
            if (value := number(record.get(name))) is not None:
                curve.add(step, value)
        for name, raw in record.items():
            if name not in _NOT_CURVES and (value := number(raw)) is not None:
                curve = self.curves.get(name)
                if curve is None:
                    curve = self.curves[name] = Curve()
                curve.add(step, value)
        # A phase that did not happen in an interval is not logged: it took no time.
        if timed := {name for name in record if name.startswith("time.")}:
            for name in self._phases - timed:
                self.curves[name].add(step, 0.0)
            self._phases |= timed & self.curves.keys()

    @property
    def last_step(self) -> int | None:
        """The last logged step."""
        return int(self.steps.last.step) if self.steps.last else None

    @property
    def seconds(self) -> float | None:
        """From the first start, or the first logged step, to the last thing that was logged; pauses count."""
        times = [float(event["time"]) for event in self.events]
        times += [point.value for point in (self.times.first, self.times.last) if point]
        return max(times) - min(times) if len(times) > 1 else None

    @property
    def state(self) -> str:
        """`running`, `finished`, `preempted`, `failed`, or `unknown`."""
        return str((self.status or {}).get("status", "unknown"))

    def named(self, prefix: str) -> dict[str, Curve]:
        """The curves whose names begin with `prefix`, by what follows it."""
        return {name.removeprefix(prefix): curve for name, curve in self.curves.items() if name.startswith(prefix)}

    @property
    def marks(self) -> list[Mark]:
        """Checkpoints and restarts, by step: those the goodput ledger tells, else what the metrics let one infer."""
        return sorted([*self._checkpoints(), *self._restarts()], key=lambda mark: mark.step)

    def _checkpoints(self) -> list[Mark]:
        if self.events:
            saves, step = [], 0
            for event in self.events:
                step = step if event["step"] is None else event["step"]
                if event["event"] == "save":
                    saves.append(Mark(step=step, kind="checkpoint", text=f"checkpoint at step {step:,}"))
            return saves
        waited = self.curves.get("checkpoint_seconds")
        points = waited.reduced(_INFERRED).points if waited else []
        return [
            Mark(step=step, kind="checkpoint", text=f"checkpoint by step {step:,.0f}")
            for step, taken in points
            if taken > 0
        ]

    def _restarts(self) -> list[Mark]:
        if self.events:
            begun = [event["step"] or 0 for event in self.events if event["event"] == "ready"]
            return [Mark(step=step, kind="restart", text=f"restarted from step {step:,}") for step in begun[1:]]
        again = [b for a, b in pairwise([math.inf, *self.redone_steps]) if b <= a]
        return [
            Mark(step=step - 1, kind="restart", text=f"restarted before step {step:,}, which was done again")
            for step in again
        ]


def number(value: object) -> float | None:
    """`value` as a float if it is one in the run's files, where NaN and the infinities are strings."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    return float(value) if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity") else None


def open_runs(directories: Iterable[Path], window: tuple[int, int] | None = None) -> list[Run]:
    """Reads the runs, and names each by as much of the end of its path as tells it from the others.

    Raises:
        ReportError: as `Run`; and if a directory is named twice.
    """
    paths = [directory.resolve() for directory in directories]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ReportError(f"The run {twice} is named twice; name each run once.")
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return [Run(path, name, window) for path, name in zip(paths, names, strict=True)]


def _check_is_run(directory: Path) -> None:
    if not directory.is_dir():
        raise ReportError(f"There is no run directory {directory}; name the folder that a run wrote to.")
    if any((directory / name).exists() for name in EXPECTED):
        return
    inside = sorted(path.name for path in directory.iterdir() if (path / "metrics.jsonl").exists())
    hint = f" Did you mean {directory / inside[-1]}?" if inside else ""
    raise ReportError(
        f"{directory} holds no run: none of {', '.join(EXPECTED)} is there.{hint or ' Name the folder of a run.'}"
    )


def _check_event(event: dict[str, Any], path: Path) -> None:
    lacks = {"event", "time", "step", "seconds", "run"} - event.keys()
    if lacks:
        raise ReportError(
            f"An event in {path} has no {', '.join(sorted(lacks))}: {str(event)[:80]}. Only titan_metrics.goodput "
            "should write there; remove the line, or move the file away."
        )
