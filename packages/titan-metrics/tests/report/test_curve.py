import math

import pytest

from titan_metrics.report.curve import Curve, Point


def curve_of(values, limit=64):
    curve = Curve(limit)
    for step, value in enumerate(values, start=1):
        curve.add(step, value)
    return curve


def test_a_short_curve_is_kept_whole():
    drawn = curve_of([3.0, 1.0, 2.0]).reduced(100)
    assert drawn.whole
    assert drawn.points == drawn.means == [(1, 3.0), (2, 1.0), (3, 2.0)]


def test_a_long_curve_keeps_its_spikes_ends_and_mean_in_bounded_memory():
    values = [math.sin(i / 500) for i in range(100_000)]
    values[12_345], values[67_890] = 9.0, -9.0
    curve = curve_of(values)
    assert len(curve._buckets) <= 64
    drawn = curve.reduced(32)
    assert not drawn.whole
    assert len(drawn.means) <= 32
    assert len(drawn.points) <= 2 * 32 + 2
    assert {(12_346, 9.0), (67_891, -9.0), (1, values[0]), (100_000, values[-1])} <= set(drawn.points)
    assert drawn.points == sorted(drawn.points)
    assert curve.high == Point(12_346, 9.0)
    assert curve.low == Point(67_891, -9.0)
    assert curve.sum / curve.count == pytest.approx(sum(values) / len(values))


def test_means_are_those_of_the_points_they_stand_for():
    drawn = curve_of([float(i) for i in range(1, 1025)]).reduced(16)
    for step, mean in drawn.means:
        assert mean == pytest.approx(step)  # a line stays a line


def test_values_that_are_not_finite_are_counted_apart():
    curve = curve_of([1.0, math.nan, 2.0, math.inf])
    assert curve.broken == 2
    assert curve.broken_steps == [2, 4]
    assert curve.count == 2
    assert curve.last == Point(3, 2.0)


def test_the_typical_value_ignores_a_slow_start():
    assert curve_of([1.0] + [10.0] * 20).typical == 10.0
    assert Curve().typical is None
