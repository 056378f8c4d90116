"""A run that is killed at random moments, many of them inside a save, ends as the run that was never killed."""

import fcntl
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest

from ranks import run_ranks
from titan_ckpt.checkpointer import Checkpointer
from titan_train import cli, trainer
from titan_train.config_file import to_json
from titan_train.interrupt import Interrupt
from training_runs import change, curve, layout, metrics, samples, train

EVERY = 3
KINDS = {
    "one process": (1, {"checkpoint.asynchronous": False}),
    "one process, saving while it trains": (1, {"checkpoint.asynchronous": True}),
    "fsdp 2, saving while it trains": (2, {"checkpoint.asynchronous": True, **layout()}),
}


def kill_again_and_again(config, world_size, kills, seed):
    """Kills the run and starts it again, looking each time at what was lost; returns how often a save was hit."""
    moments = random.Random(seed)
    output = config.output
    checkpoints = Checkpointer(output / "checkpoints", report=pytest.fail)  # whatever is damaged is reported
    inside_saves = 0
    for kill in range(kills):
        group, log = start(config, world_size, kill)
        wait_for_a_step(group, output, log)
        if moments.random() < 0.6:
            inside_saves += wait_for_a_save(output)
        time.sleep(moments.uniform(0, 0.03))
        os.killpg(group, signal.SIGKILL)
        os.waitpid(group, 0)
        wait_for_its_ranks(output)
        newest = checkpoints.newest_whole()
        kept = newest.step if newest else 0
        # The checkpoint being written when the process dies is lost too.
        bound = EVERY * (2 if config.checkpoint.asynchronous else 1)
        assert metrics(output)[-1]["step"] - kept <= bound
        assert "damaged" not in log.read_text()
    return inside_saves


def preempt_again_and_again(config, times, seed):
    """Asks the run to end and starts it again; nothing is lost any time."""
    moments = random.Random(seed)
    output = config.output
    checkpoints = Checkpointer(output / "checkpoints", report=pytest.fail)
    for i in range(times):
        group, log = start(config, 1, i, run=alone)
        wait_for_a_step(group, output, log)
        time.sleep(moments.uniform(0, 0.03))
        os.kill(group, moments.choice([signal.SIGTERM, signal.SIGUSR1]))
        _, status = os.waitpid(group, 0)
        assert os.waitstatus_to_exitcode(status) == 75, log.read_text()
        assert checkpoints.newest_whole().step == metrics(output)[-1]["step"]


def alone(config):
    """Runs the command in this process, and ends it as the command does."""
    path = Path(config.output).parent / "config.json"
    path.write_text(to_json(config))
    os._exit(cli.run(["--config", str(path)]))


def start(config, world_size, kill, run=None):
    """Forks a run into a process group of its own, and returns the group and the file of what it says."""
    log = config.output.parent / f"log-{kill}.txt"
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        config = change(config, output=str(config.output))
        try:
            if run is not None:
                run(config)
            elif world_size == 1:
                trainer.train(config, Interrupt(alone=True), name="test")
            else:
                run_ranks(world_size, trainer.train, config, Interrupt(alone=False), name="test")
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        os._exit(0)
    return pid, log


def wait_for_its_ranks(output):
    """Until no killed process holds the run's lock: ranks are not our children, so we cannot wait for them."""
    with (output / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


def wait_for_a_step(group, output, log):
    """Until the run has logged a step in this life."""
    path = output / "metrics.jsonl"
    before = path.stat().st_mtime_ns if path.exists() else 0
    deadline = time.monotonic() + 60
    while not path.exists() or path.stat().st_mtime_ns == before or not path.read_text().endswith("\n"):
        ended, _ = os.waitpid(group, os.WNOHANG)
        assert not ended, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.001)


def wait_for_a_save(output):
    """Until a checkpoint is being written; whether one was, for the run may be at its end."""
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        folder = output / "checkpoints"
        if folder.exists() and any(".tmp-" in path.name for path in folder.iterdir()):
            return True
    return False


@pytest.mark.parametrize(
    ("name", "kills"),
    [
        pytest.param(
            name, kills, marks=pytest.mark.slow if kills == 40 or name != "fsdp 2, saving while it trains" else ()
        )
        for kills in (3, 40)
        for name in KINDS
    ],
)
def test_killed_at_random_moments_a_run_ends_as_if_it_never_was(tiny, tmp_path, name, kills):
    world_size, changes = KINDS[name]
    config = change(tiny, **{"checkpoint.every": EVERY, "training.steps": 60 + 6 * kills, **changes})
    whole = train(config, tmp_path / "whole", world_size)
    config = change(config, output=tmp_path / "killed")
    inside_saves = kill_again_and_again(config, world_size, kills, seed=kills)
    assert inside_saves >= kills // 3
    resumed = train(config, tmp_path / "killed", world_size)
    for key in ("loss", "grad_norm", "lr", "tokens"):
        assert curve(resumed, key) == curve(whole, key), key
    assert samples(tmp_path / "killed", world_size) == samples(tmp_path / "whole", world_size)
    assert sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()
    )


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_preempted_at_random_moments_a_run_loses_nothing(tiny, tmp_path, times):
    steps = 40 + 20 * times
    config = change(tiny, **{"training.steps": steps, "schedule.total_steps": steps})
    whole = train(config, tmp_path / "whole")
    preempt_again_and_again(change(config, output=tmp_path / "preempted"), times, seed=times)
    resumed = train(config, tmp_path / "preempted")
    for key in ("loss", "grad_norm", "lr", "tokens"):
        assert curve(resumed, key) == curve(whole, key), key
