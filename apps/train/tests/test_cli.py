"""The command line: quick, without torch, and helpful when it is mistyped."""

import json
import os
import resource
import subprocess
import sys

import pytest

from titan_train.cli import _complain, run


def titan_train(*arguments, **environment):
    """Runs the real command in a process of its own; `None` removes an environment variable."""
    env = {k: v for k, v in (os.environ | environment).items() if v is not None}
    return subprocess.run(
        [sys.executable, "-m", "titan_train", *arguments], capture_output=True, text=True, env=env, check=False
    )


@pytest.mark.parametrize("flag", ["--help", "--print-config"])
def test_answers_in_half_a_second(flag):
    """In time of its own, whatever else the machine does."""
    seconds = []
    for _ in range(5):
        before = cpu_seconds_of_children()
        result = titan_train(flag, PYTHONDONTWRITEBYTECODE=None)
        seconds.append(cpu_seconds_of_children() - before)
        assert result.returncode == 0
    assert min(seconds) < 0.5


def cpu_seconds_of_children():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--print-config"], ["--parallel.tp", "3"], ["--training.stepz", "1"]]
)
def test_imports_no_torch_before_it_trains(arguments):
    code = (
        "import sys, titan_train.cli as c\n"
        f"try: c.run({arguments!r})\n"
        "except SystemExit: pass\n"
        "sys.exit(42 if 'torch' in sys.modules or 'numpy' in sys.modules else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_help_describes_every_field_and_the_two_stages():
    text = titan_train("--help", COLUMNS="200").stdout
    for expected in ("--module NAME", "--parallel.dp-shard", "tokens in a sequence", "torchrun --nproc-per-node"):
        assert expected in text


def test_a_misspelt_flag_suggests_the_right_one():
    result = titan_train("--training.stepz", "4")
    assert result.returncode == 2
    assert "Perhaps you meant" in result.stderr
    assert "--training.steps" in result.stderr


def test_a_misspelt_configuration_suggests_the_right_one(capsys):
    assert run(["--config", "llama3_8"]) == 2
    assert "Did you mean llama3_8b?" in capsys.readouterr().err
    assert run(["--module", "llama"]) == 2
    assert "Did you mean llama3?" in capsys.readouterr().err


def test_print_config_shows_what_overrides_changed(capsys):
    assert run(["--print-config", "--training.steps", "7", "--optimizer.lr", "0.5", "--parallel.dp-shard", "1"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert config["training"]["steps"] == config["schedule"]["total_steps"] == 7
    assert config["optimizer"]["lr"] == 0.5


@pytest.mark.parametrize(
    ("world_size", "arguments", "message"),
    [
        (4, ["--parallel.tp", "3"], "parallel.tp 3 does not divide the 4 ranks; use one of [1, 2, 4]"),
        (4, ["--parallel.dp-shard", "2"], "dp_shard 2 is a layout for 2 ranks, not for 4 ranks"),
        (64, [], "training.global_batch_size 8 is smaller than the 64 data-parallel ranks"),
        (1, ["--training.seq-len", "0"], "training.seq_len is 0; it must lie between 1 and 16,777,216"),
        (1, ["--optimizer.lr", "nan"], "optimizer.lr is nan; it must lie between 0 and"),
        (1, ["--optimizer.beta2", "1"], "optimizer.beta2 is 1.0; it must lie between 0 and"),
        (1, ["--model.layers", "1000000"], "model.layers is 1000000; it must lie between 1 and 10,000"),
        (1, ["--checkpoint.every", "-1"], "checkpoint.every is -1; give 0 for none, or more"),
        (1, ["--data.source", ""], "data.source is empty"),
        (1, ["--model.kv-heads", "3"], "model.heads 8 is not a multiple of model.kv_heads 3"),
        (1, ["--optimizer.no-decay", "colwis"], "did you mean 'colwise'. Known"),
        (1, ["--quant.recipe", "float8"], "There is no recipe 'float8'"),
        (1, ["--precision.param-dtype", "float64"], "precision.param_dtype is float64, wider than master_dtype"),
        (1, ["--metrics.log-every", "0"], "metrics.log_every is 0"),
    ],
)
def test_impossible_configurations_are_refused_with_a_remedy(monkeypatch, capsys, world_size, arguments, message):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    assert run(arguments) == 2
    assert message in capsys.readouterr().err


def test_all_problems_are_listed_at_once(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run(["--parallel.tp", "3", "--model.head-dim", "7", "--schedule.decay-ratio", "2"]) == 2
    assert capsys.readouterr().err.count("\n  - ") == 3


def test_every_rank_but_the_first_is_silent_about_a_wrong_command_line(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    assert run(["--parallel.tp", "3"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (ValueError, ""),  # a block that the model does not have: so say all ranks, and the first for them
        (RuntimeError, "titan-train (rank 1): no NVLink\n"),  # of this machine: nobody else says it
    ],
)
def test_what_follows_from_the_configuration_is_said_by_the_first_rank_only(monkeypatch, capsys, base, said):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    _complain(type("CoreError", (base,), {"__module__": "titan_core.tensor"})("no NVLink"))
    assert capsys.readouterr().err == said


def test_other_platforms_are_refused_by_name(monkeypatch, capsys):
    monkeypatch.setattr("platform.system", lambda: "Windows")
    assert run(["--print-config"]) == 2
    assert "Windows is not supported; use Linux or macOS" in capsys.readouterr().err
