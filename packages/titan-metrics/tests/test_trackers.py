import math
import os
import shutil
import threading
import time

import pytest

from titan_metrics.config import MetricsConfig
from titan_metrics.sinks import Sinks, build_sinks
from titan_metrics.trackers import TensorBoardSink


@pytest.fixture
def tensorboard():
    return pytest.importorskip("tensorboard")


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    for name, value in {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    return pytest.importorskip("wandb")


def scalars(directory, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [(event.step, event.value) for event in EventAccumulator(str(directory)).Reload().Scalars(tag)]


def test_tensorboard_reads_what_was_logged(tensorboard, tmp_path):
    config = MetricsConfig(console=False, tensorboard=True)
    with build_sinks(config, tmp_path, 10) as sinks:
        sinks.log(1, {"loss": 2.5, "tokens": 512, "phase": "warm-up"})
        sinks.log(2, {"loss": math.nan})
    losses = scalars(tmp_path / "tensorboard", "loss")
    assert losses[0] == (1, 2.5)
    assert losses[1][0] == 2
    assert math.isnan(losses[1][1])
    assert scalars(tmp_path / "tensorboard", "tokens") == [(1, 512.0)]


def test_tensorboard_hides_the_steps_that_a_resumed_run_does_again(tensorboard, tmp_path):
    config = MetricsConfig(console=False, tensorboard=True)
    with build_sinks(config, tmp_path, 10) as sinks:
        for step in range(1, 6):
            sinks.log(step, {"loss": 1.0})
    with build_sinks(config, tmp_path, 10, resume_step=3) as sinks:
        sinks.log(4, {"loss": 2.0})
    assert scalars(tmp_path / "tensorboard", "loss") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


# Warnings are errors: a traceback of TensorBoard's own thread would fail the next two.
def test_a_full_disk_switches_tensorboard_off(tensorboard, tmp_path, caplog, full_disk):
    with Sinks({"tensorboard": TensorBoardSink(tmp_path)}) as sinks, full_disk(bytes_left=4000):
        deadline = time.monotonic() + 10
        while not caplog.records and time.monotonic() < deadline:
            sinks.log(2, {"note": "x" * 1000})
            time.sleep(0.01)  # its thread writes
    (record,) = caplog.records
    assert "tensorboard" in record.getMessage()


def test_a_removed_folder_switches_tensorboard_off_with_one_warning(tensorboard, tmp_path, caplog, capfd):
    before = threading.excepthook
    with Sinks({"tensorboard": TensorBoardSink(tmp_path / "tensorboard")}) as sinks:
        shutil.rmtree(tmp_path / "tensorboard")
        sinks.log(1, {"loss": 1.0})
    (record,) = caplog.records
    assert "tensorboard" in record.getMessage()
    assert "Traceback" not in capfd.readouterr().err
    assert threading.excepthook is before


def test_threads_of_others_still_report(tensorboard, tmp_path):
    told = []
    before, threading.excepthook = threading.excepthook, told.append
    try:
        with Sinks({"tensorboard": TensorBoardSink(tmp_path)}):
            thread = threading.Thread(target=lambda: 1 / 0)
            thread.start()
            thread.join()
    finally:
        threading.excepthook = before
    assert [args.exc_type for args in told] == [ZeroDivisionError]


@pytest.mark.parametrize("resume_step", [None, 3])
def test_wandb_that_cannot_start_costs_one_warning_with_a_remedy(wandb, tmp_path, monkeypatch, caplog, resume_step):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    with build_sinks(MetricsConfig(console=False, wandb=True), tmp_path, 10, resume_step) as sinks:
        sinks.log(4, {"loss": 1.0})
    (record,) = caplog.records
    assert "--metrics.wandb-mode offline" in record.getMessage()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("variable", "mode", "found"),
    [
        ("offline", None, "offline"),
        ("disabled", None, None),
        ("disabled", "offline", "offline"),
        ("offline", "disabled", None),
    ],
)
def test_wandb_is_as_the_environment_says_unless_told_otherwise(wandb, tmp_path, monkeypatch, variable, mode, found):
    wandb.teardown()  # it reads the environment once in a process
    monkeypatch.setenv("WANDB_MODE", variable)
    config = MetricsConfig(console=False, wandb=True, wandb_mode=mode)
    with build_sinks(config, tmp_path, 10, tracker_ids={"wandb": "abcd1234"}, resume_step=2) as sinks:
        sinks.log(3, {"loss": 1.0})
    assert sinks.tracker_ids == {"wandb": "abcd1234"}
    assert bool(list((tmp_path / "wandb").glob("offline-run-*"))) == (found == "offline")


def test_wandb_offline_keeps_everything_below_the_run_directory(wandb, tmp_path, monkeypatch):
    axes = []
    real = wandb.Run.define_metric
    monkeypatch.setattr(
        wandb.Run, "define_metric", lambda *args, **kwargs: (axes.append(kwargs), real(*args, **kwargs))
    )
    config = MetricsConfig(console=False, wandb=True, wandb_mode="offline")
    run_directory = tmp_path / "run"
    with build_sinks(config, run_directory, 10, run_config={"seed": 17}) as sinks:
        sinks.log(1, {"loss": 2.5})
        run = wandb.run
        assert (run.project, run.name, run.config["seed"]) == ("titan", "run", 17)
        assert run.settings.console == "off"  # it would record every redrawn bar
        assert axes == [{"step_metric": "step"}]
        sinks.log(2, {"loss": math.nan, "phase": "warm-up"})
        assert run.summary["step"] == 2
    assert wandb.run is None
    run_id = sinks.tracker_ids["wandb"]
    (transaction_log,) = (run_directory / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    deadline = time.monotonic() + 60
    while b"loss" not in transaction_log.read_bytes():  # by a process of W&B's own
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_resumed_wandb_run_keeps_its_id(wandb, tmp_path):
    config = MetricsConfig(console=False, wandb=True, wandb_mode="offline")
    with build_sinks(config, tmp_path, 10, resume_step=3, tracker_ids={"wandb": "abcd1234"}) as sinks:
        sinks.log(4, {"loss": 1.0})
    assert sinks.tracker_ids == {"wandb": "abcd1234"}
    assert list((tmp_path / "wandb").glob("offline-run-*-abcd1234"))


def test_training_goes_on_when_the_wandb_folder_is_removed(wandb, tmp_path):
    config = MetricsConfig(console=False, wandb=True, wandb_mode="offline")
    with build_sinks(config, tmp_path, 10) as sinks:
        sinks.log(1, {"loss": 1.0})
        shutil.rmtree(tmp_path / "wandb")
        for step in range(2, 5):
            sinks.log(step, {"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_tensorboard_folder_that_became_read_only_costs_one_warning(tensorboard, tmp_path, caplog):
    folder = tmp_path / "tensorboard"
    folder.mkdir()
    folder.chmod(0o500)
    _resume_without_tensorboard(tmp_path, caplog)


def test_a_tensorboard_folder_that_is_none_any_more_costs_one_warning(tensorboard, tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("in the way")
    _resume_without_tensorboard(tmp_path, caplog)


def _resume_without_tensorboard(run, caplog):
    config = MetricsConfig(console=False, tensorboard=True)
    with build_sinks(config, run, 10, resume_step=3) as sinks:
        for step in range(4, 8):
            sinks.log(step, {"loss": 1.0})
    (record,) = caplog.records
    assert "tensorboard" in record.getMessage()
    assert (run / "metrics.jsonl").read_text().count("\n") == 4
