import pytest

from titan_metrics.report.run import open_runs
from titan_metrics.report.shares import USEFUL, goodput_bars, time_bars


def test_the_time_of_a_step_is_divided(make_run):
    (bar,) = time_bars(open_runs([make_run()]))
    shares = {share.name: share.share for share in bar.shares}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["optimizer"] == pytest.approx(18 / 121.2)


def test_the_time_of_a_run_is_divided_over_its_restarts(make_run):
    (bar,) = goodput_bars(open_runs([make_run()]))
    shares = {share.name: share.share for share in bar.shares}
    assert shares[USEFUL] == pytest.approx(120 / 192)
    assert shares["steps redone"] == pytest.approx(20 / 192)
    assert shares["down"] == pytest.approx(30 / 192)
    assert bar.whole == "3.2 min since the first start"


def test_runs_without_the_data_are_left_out(bare_run, make_run):
    runs = open_runs([bare_run, make_run()])
    assert [bar.run for bar in time_bars(runs)] == [1]
    assert [bar.run for bar in goodput_bars(runs)] == [1]
