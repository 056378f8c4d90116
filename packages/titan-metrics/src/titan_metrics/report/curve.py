"""One metric over the steps of a run, in bounded memory however long the run is.

Points are collected in buckets of neighbouring points. When there are too many buckets, each two become one, so a
curve keeps between `limit / 2` and `limit` of them, all of as many points. A bucket knows its lowest and its highest
point, which are drawn, so that no spike disappears; and its mean, which is what smoothing works on, so that it does
not swing between the two.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

LIMIT = 1024
"""Buckets that a curve keeps at most while it is read."""

_BROKEN_KEPT = 50


class Point(NamedTuple):
    """A value at a step."""

    step: float
    value: float


class _Bucket:
    __slots__ = ("count", "high", "low", "step_sum", "sum")

    def __init__(self, step: float, value: float) -> None:
        self.count = 1
        self.sum = value
        self.step_sum = step
        self.low = self.high = Point(step, value)

    def add(self, step: float, value: float) -> None:
        self.count += 1
        self.sum += value
        self.step_sum += step
        if value < self.low[1]:
            self.low = Point(step, value)
        elif value > self.high[1]:
            self.high = Point(step, value)

    def merged(self, other: "_Bucket") -> "_Bucket":
        """This bucket and the next one in one."""
        both = _Bucket(0.0, 0.0)
        both.count = self.count + other.count
        both.sum = self.sum + other.sum
        both.step_sum = self.step_sum + other.step_sum
        both.low = min(self.low, other.low, key=lambda point: point.value)
        both.high = max(self.high, other.high, key=lambda point: point.value)
        return both


class Curve:
    """Values by step, steps rising; values that are NaN or infinite are counted and their steps kept, apart."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._buckets: list[_Bucket] = []
        self._width = 1  # points a bucket takes; a power of two
        self.first: Point | None = None
        self.last: Point | None = None
        self.count = 0
        self.sum = 0.0
        self.broken = 0
        self.broken_steps: list[float] = []

    def add(self, step: float, value: float) -> None:
        """Appends a point."""
        if not math.isfinite(value):
            self.broken += 1
            if len(self.broken_steps) < _BROKEN_KEPT:
                self.broken_steps.append(step)
            return
        self.count += 1
        self.sum += value
        self.last = Point(step, value)
        if self.first is None:
            self.first = self.last
        buckets = self._buckets
        if buckets and buckets[-1].count < self._width:
            buckets[-1].add(step, value)
            return
        buckets.append(_Bucket(step, value))
        if len(buckets) > self._limit:
            self._buckets = _halved(buckets)
            self._width *= 2

    @property
    def low(self) -> Point | None:
        """The lowest point."""
        return min((bucket.low for bucket in self._buckets), key=lambda point: point.value, default=None)

    @property
    def high(self) -> Point | None:
        """The highest point."""
        return max((bucket.high for bucket in self._buckets), key=lambda point: point.value, default=None)

    @property
    def typical(self) -> float | None:
        """The median of the buckets' means: what the metric usually is, a slow start and hiccups left out."""
        means = sorted(bucket.sum / bucket.count for bucket in self._buckets)
        return means[len(means) // 2] if means else None

    def reduced(self, limit: int) -> "Reduced":
        """The curve in at most `limit` buckets (at least 2)."""
        buckets = self._buckets
        while len(buckets) > max(limit, 2):
            buckets = _halved(buckets)
        return Reduced(buckets, self.first, self.last)


class Reduced:
    """A curve as it is drawn: `points`, and the `means` that are smoothed; both are (step, value) by rising step."""

    def __init__(self, buckets: list[_Bucket], first: Point | None, last: Point | None) -> None:
        self.points = sorted(set(_extremes(buckets)) | {point for point in (first, last) if point is not None})
        self.means = [Point(bucket.step_sum / bucket.count, bucket.sum / bucket.count) for bucket in buckets]
        self.whole = all(bucket.count == 1 for bucket in buckets)
        """Whether every point is there, so that points and means are the same."""


def _extremes(buckets: list[_Bucket]) -> Iterator[Point]:
    for bucket in buckets:
        yield bucket.low
        yield bucket.high


def _halved(buckets: list[_Bucket]) -> list[_Bucket]:
    pairs = [one.merged(two) for one, two in zip(buckets[::2], buckets[1::2], strict=False)]
    return pairs + ([buckets[-1]] if len(buckets) % 2 else [])
