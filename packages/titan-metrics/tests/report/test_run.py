import json

import pytest

from recorded_runs import metrics_of, write_metrics
from titan_metrics.jsonl import resume_jsonl
from titan_metrics.report.files import ReportError
from titan_metrics.report.run import Run, open_runs


def test_a_whole_run(make_run):
    run = Run(make_run(), "a")
    assert run.last_step == 60
    assert run.state == "finished"
    assert run.missing == []
    assert run.curves["loss"].count == 60
    assert set(run.named("validation.")) == {"web.loss", "code.loss"}
    assert run.redone_steps == list(range(41, 51))
    assert run.spans.steps == list(range(51, 61))
    assert run.config["optimizer"]["lr"] == 1e-3
    assert run.environment["python"] == "3.12.1"


def test_marks_come_from_the_ledger(make_run):
    marks = [(mark.step, mark.kind) for mark in Run(make_run(), "a").marks]
    assert marks == [(20, "checkpoint"), (40, "checkpoint"), (40, "restart")]


def test_without_a_ledger_marks_come_from_the_metrics(make_run):
    folder = make_run()
    (folder / "goodput.jsonl").unlink()
    marks = [(mark.step, mark.kind) for mark in Run(folder, "a").marks]
    assert marks == [(20, "checkpoint"), (40, "checkpoint"), (40, "restart"), (60, "checkpoint")]


def test_a_run_with_little_in_it_says_what_is_missing(bare_run):
    run = Run(bare_run, "a")
    assert run.missing == ["config.json", "environment.json", "status.json", "goodput.jsonl", "spans"]
    assert run.state == "unknown"
    assert run.marks == []
    assert run.seconds is None


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_damaged_environment_is_left_out(make_run, content):
    folder = make_run()
    (folder / "environment.json").write_text(content)
    run = Run(folder, "a")
    assert run.environment is None
    assert (run.missing, run.damaged) == ([], ["environment.json"])
    (folder / "environment.json").write_text("{}")
    run.refresh()
    assert (run.environment, run.damaged) == ({}, [])


def test_a_run_is_followed_while_it_grows_and_when_it_goes_back(tmp_path):
    write_metrics(tmp_path, range(1, 11))
    run = Run(tmp_path, "a")
    before = run.stamp()
    assert run.stamp() == before
    write_metrics(tmp_path, range(11, 21))
    assert run.stamp() != before
    run.refresh()
    assert run.last_step == 20
    assert run.curves["loss"].count == 20
    resume_jsonl(tmp_path / "metrics.jsonl", 15)
    write_metrics(tmp_path, range(16, 18))
    run.refresh()
    assert run.last_step == 17
    assert run.curves["loss"].count == 17
    assert run.redone_steps == [16, 17, 18, 19, 20]


def test_a_phase_that_did_not_happen_took_no_time(tmp_path):
    write_metrics(tmp_path, range(19, 23))
    validation = Run(tmp_path, "a").curves["time.validation"]
    assert [(point.step, point.value) for point in validation.reduced(10).points] == [(20, 0.4), (21, 0.0), (22, 0.0)]


def test_values_that_are_not_finite_are_read_as_such(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": "NaN", "host": "a", "ok": true}\n')
    run = Run(tmp_path, "a")
    assert set(run.curves) == {"loss"}
    assert run.curves["loss"].broken_steps == [1]


@pytest.mark.parametrize("line", ['{"loss": 1.0}', '{"step": 1.5}'])
def test_a_line_without_a_step_is_an_error(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(ReportError, match="has no whole `step`"):
        Run(tmp_path, "a")


def test_an_event_without_its_fields_is_an_error(tmp_path):
    (tmp_path / "goodput.jsonl").write_text('{"event": "start", "time": 1.0}\n')
    with pytest.raises(ReportError, match="has no run, seconds, step"):
        Run(tmp_path, "a")


def test_a_folder_without_a_run_hints_at_one_inside(tmp_path):
    with pytest.raises(ReportError, match="There is no run directory"):
        Run(tmp_path / "none", "a")
    with pytest.raises(ReportError, match="Name the folder of a run"):
        Run(tmp_path, "a")
    write_metrics(tmp_path / "inside", [1])
    with pytest.raises(ReportError, match=r"Did you mean .*/inside\?"):
        Run(tmp_path, "a")


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    for name in ("x/same", "y/same"):
        write_metrics(tmp_path / name, [1])
    assert [run.name for run in open_runs([tmp_path / "x/same"])] == ["same"]
    assert [run.name for run in open_runs([tmp_path / "x/same", tmp_path / "y/same"])] == ["x/same", "y/same"]
    with pytest.raises(ReportError, match="named twice"):
        open_runs([tmp_path / "x/same", tmp_path / "x/../x/same"])


def test_every_metric_of_the_trainer_is_read(tmp_path):
    write_metrics(tmp_path, [20])
    run = Run(tmp_path, "a")
    assert set(run.curves) == set(json.loads(json.dumps(metrics_of(20)))) - {"time", "tokens"}
