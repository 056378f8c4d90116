"""Where a run's time went, as shares of a whole: the time split of its steps, and its goodput over all restarts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from titan_metrics.goodput import goodput
from titan_metrics.report.phases import colors, in_order
from titan_metrics.report.run import Run
from titan_metrics.report.values import percent, seconds

USEFUL = "useful"
"""The part of a run's time that moved the model forward."""

_PARTS = {"redone": "steps redone", "start": "start-up", "save": "checkpoint", "validate": "validation", "down": "down"}
_SMALLEST = 0.0005  # shares below are not shown


@dataclass(frozen=True)
class Share:
    """A part of a whole: `share` is 0 to 1, `color` an index of the page's palette of phases."""

    name: str
    share: float
    color: int
    text: str


@dataclass(frozen=True)
class Bar:
    """One run's shares, the greatest part of the story first."""

    run: int
    name: str
    whole: str
    """What the shares are of, for people."""
    shares: list[Share]


def time_bars(runs: Sequence[Run]) -> list[Bar]:
    """Each run's seconds in data wait, forward and backward pass, and so on; runs that logged none are left out."""
    bars = []
    for index, run in enumerate(runs):
        times = {name: curve.sum for name, curve in run.named("time.").items()}
        parts = {name: times[name] for name in in_order(times) if times[name] > 0}
        if parts:
            bars.append(_bar(index, run.name, "{} in logged intervals", parts))
    return bars


def goodput_bars(runs: Sequence[Run]) -> list[Bar]:
    """Each run's time from its first start to its last event; runs without a ledger are left out."""
    bars = []
    for index, run in enumerate(runs):
        if parts := goodput(run.events):
            total = max(event["time"] for event in run.events) - min(event["time"] for event in run.events)
            named = {_PARTS.get(part, part): share * total for part, share in parts.items()}
            bars.append(_bar(index, run.name, "{} since the first start", named))
    return bars


def _bar(run: int, name: str, whole: str, parts: Mapping[str, float]) -> Bar:
    total = sum(parts.values())
    palette = colors(parts)
    shares = [
        Share(part, value / total, palette[part], f"{part}: {percent(value / total)}, {seconds(value)}")
        for part, value in parts.items()
        if value / total >= _SMALLEST
    ]
    return Bar(run, name, whole.format(seconds(total)), shares)
