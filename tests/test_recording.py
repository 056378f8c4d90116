"""What a run leaves behind beside its metrics: spans, the ledger, the machine, profiles; and what watches over it."""

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ranks import run_ranks
from titan_core.shards import local
from titan_metrics.goodput import goodput
from titan_metrics.nonfinite import NonFiniteError
from titan_metrics.replicas import ReplicasDifferError
from titan_train import hooks, trainer
from titan_train.config import TrainConfig
from titan_train.config_file import to_json
from titan_train.hooks import Hook, Step
from titan_train.interrupt import Interrupt
from titan_train.validation import Validate
from training_runs import change, curve, layout, metrics, titan_train, train


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_everything_that_is_asked_for_is_written_and_changes_nothing(tiny: TrainConfig, tmp_path: Path) -> None:
    steps = {"training.steps": 6, "schedule.total_steps": 6, "checkpoint.every": 3}
    watched = {
        "spans.enabled": True,
        "metrics.norms_every": 2,
        "profiling.profile_at": 2,
        "profiling.profile_steps": 1,
        "watchdog.stall_seconds": 120.0,
        "debug.locate_nonfinite": True,
        "debug.check_replicas_every": 3,
        "debug.anomaly": True,
        "validation.sets": {"same": tiny.data.source},
        "validation.max_rows": 4,
    }
    degrees = layout(dp_replicate=2)
    plain = train(tiny, tmp_path / "plain", 2, **steps, **degrees)
    run = tmp_path / "watched"
    found = train(tiny, run, 2, **steps, **watched, **degrees)
    assert curve(found) == curve(plain)
    for rank in range(2):
        header, *spans = lines(run / f"spans/rank-{rank}.jsonl")
        assert (header["rank"], header["world_size"]) == (rank, 2)
        names = {span["name"] for span in spans}
        assert names >= {"data_wait", "agreement", "forward_backward", "optimizer", "checkpoint", "validation"}
        assert {span["step"] for span in spans if span["name"] == "optimizer"} == set(range(1, 7))
    assert [step for step, line in enumerate(found, 1) if "norms.gradient.layers.0" in line] == [2, 4, 6]
    assert all(line["loss_max"] >= line["loss"] for line in found)
    assert all(line["time.forward_backward"] > 0 for line in found)
    assert list((run / "dumps").glob("profile-rank-0-step-2*"))
    environment = json.loads((run / "environment.json").read_text())
    assert environment["layout"]["dp_replicate"] == 2


@pytest.mark.parametrize(
    ("schedule", "actions"),
    [("1F1B", {"F", "B"}), ("Interleaved1F1B", {"F", "B"}), ("ZBVZeroBubble", {"F", "I", "W"})],
)
def test_pipelines_write_down_their_actions(tiny, tmp_path, schedule, actions):
    steps = {"training.steps": 2, "schedule.total_steps": 2, "training.micro_batch_size": 3, "model.layers": 4}
    train(tiny, tmp_path, 2, **steps, **layout(pp=2, pp_schedule=schedule), **{"spans.enabled": True})
    stages = 2 if schedule == "1F1B" else 4
    done = set()
    for rank in range(2):
        _, *spans = lines(tmp_path / f"spans/rank-{rank}.jsonl")
        (whole,) = [span for span in spans if (span["name"], span["step"]) == ("forward_backward", 2)]
        found = [span for span in spans if span["name"] in actions and span["step"] == 2]
        for span in found:
            assert whole["at"] <= span["at"]
            assert span["at"] + span["seconds"] <= whole["at"] + whole["seconds"] + 1e-5  # both are rounded
            done.add((span["name"], span["stage"], span["micro_batch"]))
    assert {(stage, i) for name, stage, i in done if name == "F"} == {(s, i) for s in range(stages) for i in range(4)}
    assert {(stage, i) for name, stage, i in done if name in "BI"} == {(s, i) for s in range(stages) for i in range(4)}
    assert {name for name, *_ in done} == actions


def test_the_ledger_goes_on_across_restarts(tiny: TrainConfig, tmp_path: Path) -> None:
    train(tiny, tmp_path / "run", **{"training.steps": 3, "checkpoint.every": 2})
    train(tiny, tmp_path / "run", **{"training.steps": 5})
    events = lines(tmp_path / "run/goodput.jsonl")
    assert [event["event"] for event in events if event["event"] in ("start", "restore", "ready", "end")] == [
        *("start", "ready", "end"),
        *("start", "restore", "ready", "end"),
    ]
    shares = goodput(events)
    assert sum(shares.values()) == pytest.approx(1.0)


def test_the_greatest_loss_of_a_rank(tiny: TrainConfig, tmp_path: Path) -> None:
    """It is the same whichever way the ranks of a replica share its rows."""
    steps = {"training.steps": 2, "schedule.total_steps": 2}
    halves = train(tiny, tmp_path / "halves", 2, **steps, **layout(dp_shard=2))
    degrees: dict[str, Any]
    for name, degrees in {"tp": {"tp": 2}, "cp": {"cp": 2}, "pp": {"pp": 2}}.items():
        ours = train(tiny, tmp_path / name, 4, **steps, **layout(dp_shard=2, **degrees))
        assert curve(ours, "loss_max") == pytest.approx(curve(halves, "loss_max"), rel=1e-5)
    assert curve(halves, "loss_max") != curve(halves)


def test_speed_is_that_of_steps_alone(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done aside is logged beside the step, and is no part of its seconds."""
    monkeypatch.setattr(Validate, "_score_all", lambda self, step: time.sleep(0.5))
    save = trainer.Trainer._save
    monkeypatch.setattr(trainer.Trainer, "_save", lambda *args, **kw: (time.sleep(0.5), save(*args, **kw))[1])
    sinks = hooks.build_sinks
    monkeypatch.setattr(hooks, "build_sinks", lambda *args, **kw: (time.sleep(0.5), sinks(*args, **kw))[1])
    asides = {"validation.sets": {"same": tiny.data.source}, "validation.every": 2, "checkpoint.every": 3}
    found = train(tiny, tmp_path, **{"training.steps": 5, "schedule.total_steps": 5, **asides})
    assert [line.get("time.validation", 0) >= 0.5 for line in found] == [False, True, False, True, True]
    assert [line["checkpoint_seconds"] >= 0.5 for line in found] == [False, False, False, True, False]
    worked = sum(seconds for name, seconds in found[0].items() if name.startswith("time.") and name != "time.other")
    assert found[0]["step_seconds"] < worked + 0.25  # without the start of the sinks
    for before, line in pairwise(found):
        aside = line.get("time.validation", 0) + line["checkpoint_seconds"]
        assert line["step_seconds"] < line["time"] - before["time"] - aside + 0.25


def test_documents_cost_less_than_rows(tiny: TrainConfig, tmp_path: Path) -> None:
    confined = train(tiny, tmp_path / "confined", **{"training.steps": 1})[0]
    whole = train(tiny, tmp_path / "whole", **{"training.steps": 1, "data.confine_attention": False})[0]
    work = [line["tflops_per_device"] / line["tokens_per_second"] for line in (confined, whole)]
    assert work[0] < work[1]


def test_copies_that_differ_end_a_run(tiny: TrainConfig, tmp_path: Path) -> None:
    changes = {"debug.check_replicas_every": 2, **layout(dp_replicate=2)}
    config = change(tiny, output=str(tmp_path / "run"), **changes)

    def run() -> str:
        build = trainer.build_hooks
        trainer.build_hooks = lambda *args: [*build(*args), Meddle(args[0])]
        try:
            trainer.train(config, Interrupt(alone=False), name="test")
        except ReplicasDifferError as error:
            return str(error)
        return "they agree"

    for told in run_ranks(2, run):
        assert "norm.weight" in told
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]


class Meddle(Hook):
    """Changes a bit of what one rank holds a copy of."""

    def __init__(self, owner: trainer.Trainer) -> None:
        self.owner = owner

    def end_step(self, step: Step) -> None:
        if step.number == 2 and self.owner.env.rank == 1:
            local(self.owner.model.norm.weight).data[0] += 1e-6


def test_what_is_not_finite_is_named(tiny: TrainConfig, tmp_path: Path) -> None:
    config = change(tiny, output=str(tmp_path / "run"), **{"debug.locate_nonfinite": True, "optimizer.lr": 1e6})
    with pytest.raises(NonFiniteError, match=r"rank 0"):
        trainer.train(config, Interrupt(alone=True), name="test")
    assert metrics(tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--spans.enabled", "--spans.ranks", "0", "1"], "spans.ranks names rank 1, and the run has 1 rank"),
        (["--spans.ranks", "0"], "spans.enabled is off"),
        (["--profiling.profile-at", "2", "--profiling.profile-ranks", "3"], "profiling.profile_ranks names rank 3"),
        (["--profiling.profile-steps", "5"], "profiling.profile_at is 0"),
        (["--profiling.snapshot-at", "2"], "photographs the memory of a GPU"),
        (["--debug.check-replicas-every", "2"], "compares copies on several ranks"),
        (["--debug.locate-nonfinite", "--compile.enabled"], "sees no modules inside of compiled blocks"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    tiny: TrainConfig, tmp_path: Path, flags: list[str], message: str
) -> None:
    (tmp_path / "config.json").write_text(to_json(change(tiny, output=str(tmp_path / "run"))))
    result = titan_train("--config", tmp_path / "config.json", *flags)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())
