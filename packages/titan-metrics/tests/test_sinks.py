import json
import logging
import sys
import time

import numpy as np
import pytest
import torch

from titan_metrics.config import MetricsConfig
from titan_metrics.jsonl import JsonlSink
from titan_metrics.sinks import Sinks, build_sinks
from titan_metrics.trackers import MissingExtraError


class Recorder:
    def __init__(self):
        self.lines, self.closed = [], 0

    def log(self, step, values):
        self.lines.append((step, dict(values)))

    def close(self):
        self.closed += 1


class Broken(Recorder):
    def log(self, step, values):
        super().log(step, values)
        raise PermissionError("read-only")

    def close(self):
        super().close()
        raise OSError("still read-only")


def read(path):
    """The records, without when they were written."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "time"} for record in records]


def test_every_sink_gets_every_line_and_is_closed_once():
    first, second = Recorder(), Recorder()
    with Sinks({"first": first, "second": second}) as sinks:
        sinks.log(1, {"loss": 2.0})
        sinks.close()
    assert first.lines == second.lines == [(1, {"loss": 2.0})]
    assert (first.closed, second.closed) == (1, 1)


def test_a_failing_sink_is_switched_off_with_one_warning(caplog):
    broken, whole = Broken(), Recorder()
    with Sinks({"broken": broken, "whole": whole}) as sinks:
        for step in range(3):
            sinks.log(step, {"loss": 1.0})
    assert len(broken.lines) == broken.closed == 1
    assert len(whole.lines) == 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "broken" in record.getMessage()
    assert "read-only" in record.getMessage()


def test_a_sink_that_fails_only_when_closed_keeps_no_other_from_closing(caplog):
    class Late(Recorder):
        def close(self):
            raise OSError("full")

    whole = Recorder()
    Sinks({"late": Late(), "whole": whole}).close()
    assert whole.closed == 1
    assert len(caplog.records) == 1


def test_an_interrupt_is_no_failure_of_a_sink():
    class Interrupted(Recorder):
        def log(self, step, values):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sinks({"interrupted": Interrupted()}).log(1, {})


def test_a_full_disk_costs_the_file_and_not_the_run(tmp_path, caplog, full_disk):
    other = Recorder()
    path = tmp_path / "metrics.jsonl"
    with Sinks({"jsonl": JsonlSink(path), "other": other}) as sinks, full_disk(bytes_left=200):
        for step in range(100):
            sinks.log(step, {"loss": 1.0})
    assert len(other.lines) == 100
    assert len(caplog.records) == 1
    assert path.stat().st_size <= 200
    assert read(tmp_path / "metrics.jsonl")[:3] == [{"step": step, "loss": 1.0} for step in range(3)]


@pytest.mark.parametrize("value", [torch.ones(()), np.float32(1), None, [1.0]])
def test_a_value_that_is_no_plain_number_is_the_callers_error(value):
    recorder = Recorder()
    with pytest.raises(TypeError, match="grad_norm"):
        Sinks({"recorder": recorder}).log(1, {"grad_norm": value})
    assert recorder.lines == []


@pytest.mark.parametrize("name", ["step", "time"])
def test_what_each_line_has_anyway_is_no_metric(name):
    with pytest.raises(ValueError, match=name):
        Sinks({}).log(1, {name: 2})


def test_lines_say_when_they_were_logged(tmp_path):
    before = time.time()
    with build_sinks(MetricsConfig(console=False), tmp_path, 2) as sinks:
        sinks.log(1, {"loss": 1.5})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert before <= json.loads(line)["time"] <= time.time()


def test_the_default_sinks_are_console_and_jsonl(tmp_path, capsys):
    with build_sinks(MetricsConfig(), tmp_path / "run", 2) as sinks:
        sinks.log(2, {"loss": 1.5})
    assert capsys.readouterr().out == "step 2/2  loss 1.5000\n"
    assert read(tmp_path / "run" / "metrics.jsonl") == [{"step": 2, "loss": 1.5}]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    assert sinks.tracker_ids == {}


def test_the_console_can_be_off(tmp_path, capsys):
    with build_sinks(MetricsConfig(console=False), tmp_path, 2) as sinks:
        sinks.log(1, {"loss": 1.5})
    assert capsys.readouterr().out == ""


def test_a_resumed_run_has_each_step_once(tmp_path):
    config = MetricsConfig(console=False)
    for resume_step, first, last in ((None, 1, 6), (3, 4, 8)):
        with build_sinks(config, tmp_path, 8, resume_step) as sinks:
            for step in range(first, last):
                sinks.log(step, {"loss": 1.0})
    assert [record["step"] for record in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    assert [record["step"] for record in read(tmp_path / "metrics.redone.jsonl")] == [4, 5]


def test_a_new_run_in_a_used_folder_keeps_the_old_lines_apart(tmp_path):
    config = MetricsConfig(console=False)
    for loss in (1.0, 2.0):
        with build_sinks(config, tmp_path, 8) as sinks:
            sinks.log(0, {"loss": loss})
    assert read(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 2.0}]
    assert read(tmp_path / "metrics.redone.jsonl") == [{"step": 0, "loss": 1.0}]


def test_a_resumed_console_counts_from_the_restored_step(tmp_path, capsys):
    with build_sinks(MetricsConfig(), tmp_path, 10, resume_step=9) as sinks:
        sinks.log(9, {})  # nothing done yet: no speed, so no time left
    assert capsys.readouterr().out == "step 9/10\n"


def test_the_id_of_a_tracker_that_is_off_for_now_is_kept(tmp_path):
    with build_sinks(MetricsConfig(console=False), tmp_path, 10, 3, tracker_ids={"wandb": "abcd1234"}) as sinks:
        assert sinks.tracker_ids == {"wandb": "abcd1234"}


def test_all_config_problems_are_raised_before_anything_is_opened(tmp_path):
    with pytest.raises(ValueError, match=r"log_every.*peak_tflops"):
        build_sinks(MetricsConfig(log_every=0, peak_tflops=0.0), tmp_path / "run", 10)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resume_step", [None, 5])
def test_a_sink_that_cannot_open_costs_one_warning(tmp_path, caplog, capsys, resume_step):
    (tmp_path / "metrics.jsonl").mkdir()
    with build_sinks(MetricsConfig(), tmp_path, 10, resume_step) as sinks:
        sinks.log(6, {"loss": 1.0})
    (record,) = caplog.records
    assert "without jsonl metrics" in record.getMessage()
    assert "step 6/10" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "extra"), [(MetricsConfig(tensorboard=True), "tensorboard"), (MetricsConfig(wandb=True), "wandb")]
)
@pytest.mark.parametrize("resume_step", [None, 5])
def test_a_missing_library_is_named_with_its_remedy(tmp_path, monkeypatch, config, extra, resume_step):
    monkeypatch.setitem(sys.modules, extra, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=rf"pip install './packages/titan-metrics\[{extra}\]'"):
        build_sinks(config, tmp_path, 10, resume_step)


def test_what_was_opened_is_closed_when_a_later_sink_fails(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    closed = []
    monkeypatch.setattr(JsonlSink, "close", lambda self: closed.append(self._file.close()))
    with pytest.raises(MissingExtraError):
        build_sinks(MetricsConfig(wandb=True), tmp_path, 10)
    assert len(closed) == 1
