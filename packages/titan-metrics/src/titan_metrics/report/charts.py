"""Which charts a page has, and their points: every number that was logged is in one of them.

A chart is one metric, or a few that share a unit, of all runs. One that no run has logged is left out. To keep a page
below 10 MB, however many runs, metrics and steps, all charts share `PAGE_POINTS`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from titan_metrics.report.curve import Curve
from titan_metrics.report.phases import colors, in_order
from titan_metrics.report.run import Run
from titan_metrics.report.values import FORMATS

PAGE_POINTS = 240_000
"""Points of all curves together; a point takes some 20 bytes of the page."""

_BUCKETS = (24, 600)  # that a curve is drawn from at least and at most
_POINTS_PER_BUCKET = 3  # the lowest, the highest, the mean
_ELSEWHERE = ("norms.", "time.", "allocator.", "checkpoint_seconds")  # shown, or always zero
_OTHERS = 48  # charts of metrics that the page knows nothing of

Select = Callable[[Run], dict[str, Curve]]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart's shape: which curves of a run it shows, under which labels."""

    id: str
    """Lower-case letters, digits and hyphens; the chart's place in the page."""
    title: str
    unit: str = ""
    """What the values are, said below the title; empty if the title says it."""
    format: str = "plain"
    """A key of `values.FORMATS`."""
    curves: dict[str, list[tuple[int, Curve]]] = field(default_factory=dict)
    """Label (empty if the chart has one metric) -> the index of each run that logged it, and its curve."""
    stacked: bool = False
    """Whether the curves are parts of a whole; such a chart has one run."""


def charts_by_section(runs: Sequence[Run]) -> dict[str, list[Chart]]:
    """The charts of each section of the page: `learning`, `speed`, `time`, `memory`, `other`."""
    known = {
        "learning": _present(_learning(runs)),
        "speed": _present(_speed(runs)),
        "time": _present(_time(runs)),
        "memory": _present(_memory(runs)),
    }
    taken = {id(curve) for charts in known.values() for chart in charts for curve in _curves(chart)}
    names = sorted({name for run in runs for name, curve in run.curves.items() if id(curve) not in taken})
    rest = [name for name in names if not name.startswith(_ELSEWHERE)]
    return known | {"other": [_chart(runs, f"other-{i}", name, _only(name)) for i, name in enumerate(rest[:_OTHERS])]}


def data_of(chart: Chart, buckets: int) -> dict[str, Any]:
    """What the page's script draws; coordinates have 7 significant digits."""
    series = []
    palette = colors(chart.curves)
    for label, lines in chart.curves.items():
        for run, curve in lines:
            drawn = curve.reduced(buckets)
            points = drawn.means if chart.stacked else drawn.points
            if not points:
                continue
            line: dict[str, Any] = {"run": run, "label": label, "x": _short(p.step for p in points)}
            line["y"] = _short(p.value for p in points)
            if not (drawn.whole or chart.stacked):
                line["mean"] = [_short(p.step for p in drawn.means), _short(p.value for p in drawn.means)]
            if chart.stacked:
                line["color"] = f"--phase-{palette[label]}"
            if curve.broken:
                line["broken"] = curve.broken_steps
            series.append(line)
    return {
        "id": chart.id,
        "title": chart.title,
        "format": chart.format,
        "stacked": chart.stacked,
        "series": series,
    }


def buckets_for(charts: Iterable[Chart]) -> int:
    """Buckets that each curve may have, so that all of `charts` together keep to `PAGE_POINTS`."""
    curves = sum(len(_curves(chart)) for chart in charts)
    least, most = _BUCKETS
    return min(max(PAGE_POINTS // (_POINTS_PER_BUCKET * max(curves, 1)), least), most)


def spoken(chart: Chart, runs: Sequence[Run]) -> str:
    """The chart in words, for those who cannot see it: each line's first, last, lowest and highest value."""
    show = FORMATS[chart.format]
    told = []
    for label, lines in chart.curves.items():
        for run, curve in lines:
            if curve.first and curve.last and curve.low and curve.high:
                name = (
                    " ".join(part for part in (runs[run].name if len(runs) > 1 else "", label) if part) or chart.title
                )
                told.append(
                    f"{name}: {show(curve.first.value)} at step {curve.first.step:,.0f}, "
                    f"{show(curve.last.value)} at step {curve.last.step:,.0f}, "
                    f"lowest {show(curve.low.value)}, highest {show(curve.high.value)}."
                )
    return " ".join(told)


def _learning(runs: Sequence[Run]) -> list[Chart]:
    sets: dict[str, list[str]] = {}  # what was measured -> names of the validation sets
    for name in {key for run in runs for key in run.named("validation.")}:
        part, _, measured = name.rpartition(".")
        sets.setdefault(measured, []).append(part)
    validation = [
        _chart(
            runs, f"validation-{i}", f"Validation {measured}", _each({f"validation.{p}.{measured}": p for p in parts})
        )
        for i, (measured, parts) in enumerate(sorted((m, sorted(p)) for m, p in sets.items()))
    ]
    return [
        _chart(
            runs, "loss", "Loss", _each({"loss": "mean", "loss_max": "highest rank"}), unit="training loss per token"
        ),
        *validation,
        _chart(runs, "grad-norm", "Gradient norm", _only("grad_norm"), unit="before clipping"),
        _chart(runs, "lr", "Learning rate", lambda run: _only("lr")(run) | run.named("lr.")),
    ]


def _speed(runs: Sequence[Run]) -> list[Chart]:
    return [
        _chart(runs, "tokens-per-second", "Tokens per second", _only("tokens_per_second"), "all devices", "large"),
        _chart(runs, "mfu", "MFU", _only("mfu"), "model FLOPs utilization", "percent"),
        _chart(runs, "tflops", "TFLOP/s", _only("tflops_per_device"), "of one device"),
        _chart(
            runs, "tokens-per-device", "Tokens per second", _only("tokens_per_second_per_device"), "one device", "large"
        ),
        _chart(runs, "step-seconds", "Step time", _only("step_seconds"), "mean of the interval", "seconds"),
        _chart(runs, "data-wait", "Waiting for data", _only("data_wait_share"), "share of the time", "percent"),
    ]


def _time(runs: Sequence[Run]) -> list[Chart]:
    stacked = [
        Chart(
            id=f"time-{i}",
            title="Time split" if len(runs) == 1 else f"Time split of {run.name}",
            unit="seconds of each logged interval",
            format="seconds",
            stacked=True,
            curves={name: [(i, run.curves[f"time.{name}"])] for name in in_order(run.named("time."))},
        )
        for i, run in enumerate(runs)
    ]
    waits = _each({"checkpoint_seconds": "checkpoints", "time.validation": "validation"})
    pauses = _chart(runs, "pauses", "Pauses", lambda run: _above_zero(waits(run)), "of training", "seconds")
    return [*stacked, pauses]


def _memory(runs: Sequence[Run]) -> list[Chart]:
    return [
        _chart(runs, "memory", "Memory", lambda run: _spaced(run.named("memory.")), format="bytes"),
        _chart(
            runs,
            "allocator",
            "Allocator trouble",
            lambda run: _above_zero(run.named("allocator.")),
            "since the process started",
        ),
    ]


def _above_zero(curves: dict[str, Curve]) -> dict[str, Curve]:
    return {name: curve for name, curve in curves.items() if curve.high and curve.high.value > 0}


def _chart(runs: Sequence[Run], name: str, title: str, select: Select, unit: str = "", format: str = "plain") -> Chart:
    curves: dict[str, list[tuple[int, Curve]]] = {}
    for index, run in enumerate(runs):
        for label, curve in select(run).items():
            curves.setdefault(label, []).append((index, curve))
    if len(curves) == 1:  # one metric needs no name beside the title, unless that is general
        ((label, lines),) = curves.items()
        curves = {"" if label in ("mean", title.lower()) else label: lines}
    return Chart(id=name, title=title, unit=unit, format=format, curves=curves)


def _only(name: str) -> Select:
    return lambda run: {"": run.curves[name]} if name in run.curves else {}


def _each(labels: dict[str, str]) -> Select:
    return lambda run: {label: run.curves[name] for name, label in labels.items() if name in run.curves}


def _spaced(curves: dict[str, Curve]) -> dict[str, Curve]:
    return {name.replace("_", " "): curve for name, curve in curves.items()}


def _present(charts: Iterable[Chart]) -> list[Chart]:
    return [chart for chart in charts if any(curve.count or curve.broken for curve in _curves(chart))]


def _curves(chart: Chart) -> list[Curve]:
    return [curve for lines in chart.curves.values() for _, curve in lines]


def _short(values: Iterable[float]) -> list[float]:
    short = (float(f"{value:.7g}") for value in values)
    return [int(value) if value == int(value) and abs(value) < 1e15 else value for value in short]
