"""Hooks from outside of titan, by their names."""

import json
from pathlib import Path

import pytest

from titan_train.config_file import to_json
from titan_train.hooks import Hook
from titan_train.own_hooks import HookError, open_hooks
from training_runs import change, curve, layout, titan_train, train


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)


class Note(Hook):
    """Writes down what it is told, and logs twice the number of the step."""

    def __init__(self, trainer, log):
        self.log, self.path = log, Path(trainer.config.output) / f"noted-{trainer.env.rank}.jsonl"
        self.weights = sum(p.numel() for p in trainer.model.parameters())

    def note(self, **what):
        with self.path.open("a") as file:
            print(json.dumps(what), file=file)

    def end_step(self, step):
        self.note(step=step.number, last=step.is_last, weights=self.weights)
        self.log.attach({"twice": 2 * step.number})

    def end_save(self, blocking_seconds):
        self.note(saved=True)

    def end_run(self):
        self.note(ended=True)

    def close(self):
        self.note(closed=True)


def noted(run, rank=0):
    return [json.loads(line) for line in (run / f"noted-{rank}.jsonl").read_text().splitlines()]


def test_the_loop_calls_them_and_what_they_attach_is_logged(tiny, tmp_path):
    config = change(tiny, hooks=("test_own_hooks:Note",), **{"training.steps": 3})
    lines = train(config, tmp_path / "run", 2, **layout(dp_shard=2))
    assert [line["twice"] for line in lines] == [2, 4, 6]
    for rank in range(2):
        found = noted(tmp_path / "run", rank)
        assert [line["step"] for line in found if "step" in line] == [1, 2, 3]
        assert [line for line in found if "step" not in line] == [{"saved": True}, {"ended": True}, {"closed": True}]
    assert found[0]["weights"] > 0
    plain = train(change(config, hooks=()), tmp_path / "plain", 2, **layout(dp_shard=2))
    assert curve(plain) == curve(lines)


def test_they_are_no_part_of_the_experiment(tiny, tmp_path):
    train(change(tiny, **{"training.steps": 2}), tmp_path / "run")
    path = tmp_path / "more.json"
    path.write_text(to_json(change(tiny, output=str(tmp_path / "run"), hooks=("test_own_hooks:Note",))))
    result = titan_train("--config", path, "--training.steps=4")
    assert result.returncode == 0, result.stderr
    assert [line["step"] for line in noted(tmp_path / "run") if "step" in line] == [3, 4]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("alarm", "'alarm' is no MODULE:NAME"),
        ("nowhere:Alarm", "'nowhere:Alarm' cannot be imported (No module named 'nowhere'). Install the module"),
        ("json:Alarm", "'json:Alarm' cannot be imported (module 'json' has no attribute 'Alarm')"),
        ("json:__name__", "'json:__name__' is a str, which cannot be called"),
    ],
)
def test_a_name_that_stands_for_nothing_is_said_before_anything_is_built(tiny, tmp_path, name, says):
    result = titan_train("--hooks", name, "--data.source", tiny.data.source, "--output", tmp_path / "run")
    assert result.returncode == 1
    assert f"hooks: {says}" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "tokenizing" not in result.stdout


def test_what_makes_no_hook_is_refused():
    with pytest.raises(HookError, match=r"'builtins:dict' makes a dict; derive it from titan_train\.hooks\.Hook"):
        open_hooks(["builtins:dict"])
