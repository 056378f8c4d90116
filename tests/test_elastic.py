"""Runs under torchrun that lose a machine and go on without it, or get another one; here a machine is a torchrun."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from titan_train.config_file import to_json
from training_runs import change, curve, metrics, samples, train

STEPS, EVERY = 30, 3


class Machines:
    """Torchruns of one job, of one rank each; the first has the store at which they meet."""

    def __init__(self, folder, config):
        self.path = folder / "config.json"
        self.path.write_text(to_json(config))
        self.logs = folder
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.started = []

    def start(self):
        conf = f"is_host={int(not self.started)},last_call_timeout=1,keep_alive_interval=1"
        meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{self.port}", "--rdzv-id=job", f"--rdzv-conf={conf}"]
        size = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--shutdown-timeout=60"]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *size,
            *meet,
            "-m",
            "titan_train",
            "--config",
            self.path,
        ]
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
        with (self.logs / f"machine-{len(self.started)}.txt").open("w") as log:
            self.started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        return self.started[-1]

    def said(self):
        return "\n".join(path.read_text() for path in sorted(self.logs.glob("machine-*.txt")))

    def wait_until(self, condition, seconds=120):
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.started[0].poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def kill_all(self):
        for machine in self.started:
            machine.kill()
            machine.wait()


@pytest.fixture
def machines(tmp_path):
    made = []

    def make(config):
        made.append(Machines(tmp_path, config))
        return made[-1]

    yield make
    for each in made:
        each.kill_all()


def newest(run):
    folder = run / "checkpoints"
    steps = [int(path.name[5:]) for path in folder.iterdir() if path.name[5:].isdigit()] if folder.exists() else []
    return max(steps, default=0)


def loses_a_machine(tiny, machines, run, moment):
    """A job on two machines, one of which is gone after the first checkpoint: the samples and losses of each step."""
    config = change(
        tiny,
        output=str(run),
        **{"training.steps": STEPS, "schedule.total_steps": STEPS, "checkpoint.every": EVERY},
    )
    job = machines(config)
    first, second = job.start(), job.start()
    job.wait_until(lambda: newest(run) >= EVERY)
    time.sleep(moment)
    second.send_signal(signal.SIGKILL)  # its rank ends with it
    assert first.wait(timeout=180) == 0, job.said()
    assert "layout 2 ranks" in job.said()
    assert "layout one process" in job.said(), job.said()
    return metrics(run)


def test_a_job_that_loses_a_machine_goes_on_with_the_others(tiny, machines, tmp_path):
    found = loses_a_machine(tiny, machines, tmp_path / "run", 0.05)
    config = change(tiny, **{"training.steps": STEPS, "schedule.total_steps": STEPS})
    whole = train(config, tmp_path / "whole")
    assert curve(found) == pytest.approx(curve(whole), rel=1e-5)
    # Rank 1 was there for some of the steps only; what was read last counts.
    read, expected = samples(tmp_path / "run", 1), samples(tmp_path / "whole", 1)
    assert {step: ids for step, ids in read.items() if step > STEPS // 2} == {
        step: ids for step, ids in expected.items() if step > STEPS // 2
    }


@pytest.mark.slow
def test_it_does_so_every_time(tiny, machines, tmp_path):
    config = change(tiny, **{"training.steps": STEPS, "schedule.total_steps": STEPS})
    whole = curve(train(config, tmp_path / "whole"))
    moments = random.Random(0)
    for i in range(20):
        found = loses_a_machine(tiny, machines, tmp_path / f"run-{i}", moments.uniform(0, 0.2))
        assert curve(found) == pytest.approx(whole, rel=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a process when its parent is gone")
def test_a_rank_does_not_outlive_its_torchrun(tiny, machines, tmp_path):
    job = machines(change(tiny, output=str(tmp_path / "run"), **{"training.steps": 100_000}))
    torchrun = job.start()
    job.wait_until((tmp_path / "run" / "metrics.jsonl").exists)
    (rank,) = subprocess.run(
        ["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    torchrun.kill()
    deadline = time.monotonic() + 10
    while alive(int(rank)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
