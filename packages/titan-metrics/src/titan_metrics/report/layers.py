"""Norms of each layer's gradient, parameters and update, from metrics named `norms.gradient.FQN` and so on."""

from collections.abc import Sequence
from dataclasses import dataclass

from titan_metrics.report.curve import Curve
from titan_metrics.report.run import Run
from titan_metrics.report.values import plain

_ROWS = 400
_WIDTH, _HEIGHT = 120.0, 22.0  # of a sparkline, in its own units
_SPARK_BUCKETS = 60


@dataclass(frozen=True)
class Layer:
    """The last recorded norms of one parameter or module."""

    name: str
    gradient: str
    parameter: str
    update: str
    ratio: str
    """Update norm over parameter norm: a step's relative size."""
    spark: str
    """Points of an SVG polyline: the gradient norm over the steps."""


@dataclass(frozen=True)
class Layers:
    """One run's layers; `left_out` counts those that are not shown."""

    run: int
    name: str
    rows: list[Layer]
    left_out: int


def layers(runs: Sequence[Run]) -> list[Layers]:
    """The layers of each run that recorded norms."""
    found = []
    for index, run in enumerate(runs):
        kinds = [run.named(f"norms.{kind}.") for kind in ("gradient", "parameter", "update")]
        names = list(dict.fromkeys(name for kind in kinds for name in kind))
        rows = [_layer(name, *(kind.get(name) for kind in kinds)) for name in names[:_ROWS]]
        if rows:
            found.append(Layers(index, run.name, rows, len(names) - len(rows)))
    return found


def _layer(name: str, gradient: Curve | None, parameter: Curve | None, update: Curve | None) -> Layer:
    moved, size = _last(update), _last(parameter)
    return Layer(
        name=name,
        gradient=plain(_last(gradient)),
        parameter=plain(size),
        update=plain(moved),
        ratio=plain(moved / size if moved is not None and size else None),
        spark=_spark(gradient) if gradient is not None else "",
    )


def _last(curve: Curve | None) -> float | None:
    return curve.last.value if curve is not None and curve.last is not None else None


def _spark(curve: Curve) -> str:
    means = curve.reduced(_SPARK_BUCKETS).means
    if len(means) < 2:
        return ""
    low, high = min(point.value for point in means), max(point.value for point in means)
    first, last = means[0].step, means[-1].step
    wide = _WIDTH / (last - first)
    tall = (_HEIGHT - 2) / ((high - low) or 1)
    return " ".join(f"{(step - first) * wide:.1f},{_HEIGHT - 1 - (value - low) * tall:.1f}" for step, value in means)
