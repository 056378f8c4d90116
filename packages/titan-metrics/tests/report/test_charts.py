import pytest

from recorded_runs import metrics_of, write_metrics
from titan_metrics.report import charts as charts_module
from titan_metrics.report.charts import buckets_for, charts_by_section, data_of, spoken
from titan_metrics.report.run import open_runs


def by_id(runs):
    return {chart.id: chart for charts in charts_by_section(runs).values() for chart in charts}


def test_every_number_that_was_logged_is_in_a_chart(make_run):
    runs = open_runs([make_run()])
    shown = {id(curve) for chart in by_id(runs).values() for lines in chart.curves.values() for _, curve in lines}
    left_out = {name for name, curve in runs[0].curves.items() if id(curve) not in shown}
    # Norms have a table of their own; an allocator without trouble is no news.
    assert {name.partition(".")[0] for name in left_out} == {"norms", "allocator"}


def test_charts_stand_where_a_reader_looks_for_them(make_run):
    sections = charts_by_section(open_runs([make_run()]))
    assert {name: [chart.id for chart in charts] for name, charts in sections.items()} == {
        "learning": ["loss", "validation-0", "grad-norm", "lr"],
        "speed": ["tokens-per-second", "mfu", "tflops", "tokens-per-device", "step-seconds", "data-wait"],
        "time": ["time-0", "pauses"],
        "memory": ["memory"],
        "other": ["other-0", "other-1", "other-2"],
    }


def test_runs_are_overlaid(make_run):
    chart = by_id(open_runs([make_run("a"), make_run("b")]))["loss"]
    assert {label: [run for run, _ in lines] for label, lines in chart.curves.items()} == {
        "mean": [0, 1],
        "highest rank": [0, 1],
    }


def test_a_chart_has_the_points_that_were_logged(tmp_path):
    write_metrics(tmp_path, range(1, 4))
    data = data_of(by_id(open_runs([tmp_path]))["grad-norm"], 100)
    assert data["series"] == [{"run": 0, "label": "", "x": [1, 2, 3], "y": [2, 1.5, 1.333333]}]


def test_a_long_curve_is_reduced_and_keeps_what_smoothing_needs(tmp_path):
    write_metrics(tmp_path, range(1, 2001))
    (line, _) = data_of(by_id(open_runs([tmp_path]))["loss"], 50)["series"]
    assert 50 <= len(line["x"]) <= 102
    steps, means = line["mean"]
    assert len(steps) == len(means) <= 50


def test_parts_of_a_whole_lie_on_the_same_steps(make_run):
    series = data_of(by_id(open_runs([make_run()]))["time-0"], 10)["series"]
    assert [line["label"] for line in series] == ["forward_backward", "optimizer", "validation", "other"]
    assert [line["color"] for line in series] == ["--phase-0", "--phase-1", "--phase-4", "--phase-5"]
    assert series[0]["x"] == series[1]["x"] == series[3]["x"]


def test_the_points_of_a_page_are_bounded_however_much_was_logged(make_run, monkeypatch):
    charts = list(by_id(open_runs([make_run()])).values())
    curves = sum(len(lines) for chart in charts for lines in chart.curves.values())
    monkeypatch.setattr(charts_module, "PAGE_POINTS", 90 * curves)
    assert buckets_for(charts) == 30
    monkeypatch.setattr(charts_module, "PAGE_POINTS", 1)
    assert buckets_for(charts) == 24
    assert buckets_for(charts[:0]) == 24


def test_a_chart_can_be_read_aloud(tmp_path):
    write_metrics(tmp_path, range(1, 4))
    runs = open_runs([tmp_path])
    assert spoken(by_id(runs)["mfu"], runs) == "MFU: 41.1 % at step 1, 41.3 % at step 3, lowest 41.1 %, highest 41.3 %."


def test_trouble_of_the_allocator_is_shown_if_there_is_any(tmp_path):
    write_metrics(tmp_path, [1])
    assert "allocator" not in by_id(open_runs([tmp_path]))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"allocator.retries": 0', '"allocator.retries": 3'))
    assert "allocator" in by_id(open_runs([tmp_path]))


@pytest.mark.parametrize("name", ["expert_load_max", "epoch.books"])
def test_metrics_that_the_page_does_not_know_have_a_chart_each(tmp_path, name):
    assert name in metrics_of(1)
    write_metrics(tmp_path, [1, 2])
    assert name in [chart.title for chart in charts_by_section(open_runs([tmp_path]))["other"]]
