"""Runs of several replica groups, which are killed and come back: their curve is that of one process."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ranks import run_ranks
from replica_processes import wait_until
from titan_core.replicas.config import AveragingConfig
from titan_core.shards import local
from titan_models.shape import MoEConfig
from titan_train import trainer
from titan_train.cli import run
from titan_train.hooks import Hook
from titan_train.interrupt import Interrupt
from titan_train.validate import problems
from training_runs import FLOAT64, change, curve, layout, metrics, titan_train, train

README = Path(__file__).parents[1] / "apps" / "train" / "README.md"
SETTINGS = {
    "replica.host": "localhost",
    "replica.timeout_seconds": 20.0,
    "replica.join_seconds": 20.0,
    "precision": FLOAT64,
}


class Probe(Hook):
    """Calls `at[step]` at the end of that step, and then waits, so that others may come."""

    def __init__(self, at, seconds):
        self.at, self.seconds = at, seconds

    def end_step(self, step):
        self.at.get(step.number, lambda: None)()
        time.sleep(self.seconds)


def run_group(config, *, at=None, during=None, seconds=0.0, joining=None):
    """One rank of a group: trains, and returns this rank's parameters.

    `at`: step -> what is called after it; `during`: step -> what is called in the middle of it; `joining`: a file that
    is made before it joins.
    """
    build, make, join, found = trainer.build_hooks, trainer.Trainer.__init__, trainer.Trainer.join, []
    trainer.build_hooks = lambda *args: [*build(*args), Probe(at or {}, seconds)]

    def init(self, *args):
        make(self, *args)
        found.append(self)
        accumulate = self.layout.accumulate

        def in_the_middle(batch, **options):
            (during or {}).get(self.progress.step + 1, lambda: None)()
            return accumulate(batch, **options)

        self.layout.accumulate = in_the_middle

    def says_so(self, *args):
        if joining is not None:
            joining.touch()
        join(self, *args)

    trainer.Trainer.__init__, trainer.Trainer.join = init, says_so
    with Interrupt(alone="WORLD_SIZE" not in os.environ) as interrupt:
        trainer.train(config, interrupt, name="test")
    return {name: local(p).detach().clone() for name, p in found[0].model.named_parameters()}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def several(tiny, tmp_path, address):
    """The configuration of a group."""

    def configure(group, groups, **changes):
        settings = {"replica.lighthouse": address, "replica.group": group, "replica.groups": groups}
        return change(tiny, output=str(tmp_path / "run"), **SETTINGS | settings | changes)

    return configure


def rows_read(run, groups, ranks=1):
    """Step -> the samples that all groups have read in it, in order; a group's last reading counts."""
    found = {}
    for group in range(groups):
        for rank in range(ranks):
            path = run / "groups" / str(group) / "samples" / f"rank-{rank}.jsonl"
            own = {entry["step"]: entry["sample_ids"] for entry in map(json.loads, path.read_text().splitlines())}
            for step, ids in own.items():
                found.setdefault(step, []).extend(i for i in ids if i >= 0)
    return found


def rows_of_one_process(run):
    lines = (run / "samples" / "rank-0.jsonl").read_text().splitlines()
    return {entry["step"]: entry["sample_ids"] for entry in map(json.loads, lines)}


def assert_equal(parameters):
    for other in parameters[1:]:
        assert all(torch.equal(other[name], parameters[0][name]) for name in other)


def assert_same_curve(lines, whole):
    for key in ("loss", "grad_norm", "lr", "tokens"):
        assert curve(lines, key) == pytest.approx(curve(whole, key), abs=1e-9), key


@pytest.mark.parametrize(
    ("count", "victim"),
    [(2, 0), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(3, 1, marks=pytest.mark.slow)],
    ids=["0 of 2", "1 of 2", "1 of 3"],
)
def test_a_group_killed_in_a_step_comes_back_and_the_curve_is_that_of_one_process(
    tiny, tmp_path, several, start, count, victim
):
    alone, again = tmp_path / "alone", tmp_path / "again"

    def until_it_is_back():
        alone.touch()
        wait_until(again.exists)

    saving = {"checkpoint.every": 7, "checkpoint.keep_latest": 0}
    options = {"at": {8: until_it_is_back, 9: lambda: time.sleep(1)}, "seconds": 0.02}
    others = [i for i in range(count) if i != victim]
    groups = [start(run_group, several(i, count, **saving), **options) for i in others]
    killed = start(run_group, several(victim, count, **saving), during={5: die})
    assert killed.wait() == -signal.SIGKILL
    wait_until(alone.exists)
    back = start(run_group, several(victim, count, **saving), joining=again)
    parameters = [group.result() for group in [*groups, back]]
    whole = train(tiny, tmp_path / "whole", precision=FLOAT64)
    run = tmp_path / "run"
    lines = metrics(run / "groups" / str(others[0]))
    assert_same_curve(lines, whole)
    assert [lines[step - 1]["replica.groups"] for step in (4, 8, 20)] == [count, count - 1, count]
    assert lines[-1]["replica.discarded"] >= 1
    assert_equal(parameters)
    steps = [line["step"] for line in metrics(run / "groups" / str(victim))]
    assert steps[:4] == [1, 2, 3, 4]
    assert steps[4] in range(10, 20)
    assert steps[4:] == list(range(steps[4], 21))
    read = rows_read(run, count)
    for step, ids in rows_of_one_process(tmp_path / "whole").items():
        assert sorted(read[step]) == sorted(ids), step
    # The first group of the quorum saves: without group 0 another one does, and group 0 again when it is back.
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-14", "step-20", "step-7"]
    assert ("Saving step 14" in back.log.read_text()) == (victim == 0)


def test_a_run_goes_on_with_another_number_of_groups_or_with_none(tiny, tmp_path, several, start):
    run, whole = tmp_path / "run", train(tiny, tmp_path / "whole", precision=FLOAT64)
    saving = {"checkpoint.every": 5}
    groups = [start(run_group, several(i, 2, **saving, **{"training.steps": 6})) for i in range(2)]
    assert_equal([group.result() for group in groups])
    assert curve(metrics(run / "groups" / "0")) == pytest.approx(curve(whole)[:6], abs=1e-9)
    lines = train(tiny, run, precision=FLOAT64, **saving, **{"training.steps": 11})
    assert [line["loss"] for line in lines] == pytest.approx(curve(whole)[6:11], abs=1e-9)
    groups = [start(run_group, several(i, 3, **saving)) for i in range(3)]
    assert_equal([group.result() for group in groups])
    assert [line["loss"] for line in metrics(run / "groups" / "2")] == pytest.approx(curve(whole)[11:], abs=1e-9)


def test_routers_count_over_all_groups_and_validation_over_the_whole_set(tmp_path, several, start, tiny):
    moe = MoEConfig(experts=4, top_k=2, hidden_dim=32, balance_loss=0.1, z_loss=0.01, bias_update_rate=0.01)
    validation = {"validation.sets": {"same": tiny.data.source}, "validation.every": 3, "validation.max_rows": 7}
    changes = {"model.moe": moe, "training.steps": 6, **validation}
    groups = [start(run_group, several(i, 2, **changes)) for i in range(2)]
    assert_equal([group.result() for group in groups])
    whole = train(tiny, tmp_path / "whole", precision=FLOAT64, **changes)
    lines = metrics(tmp_path / "run" / "groups" / "0")
    assert_same_curve(lines, whole)
    assert curve(lines, "expert_load_max") == curve(whole, "expert_load_max")
    found, expected = ([line["validation.same.loss"] for line in run[2::3]] for run in (lines, whole))
    assert found == pytest.approx(expected, abs=1e-9)


def test_a_signal_ends_the_group_that_receives_it_and_the_others_go_on(tmp_path, several, start):
    told = start(run_group, several(0, 2), at={5: lambda: os.kill(os.getpid(), signal.SIGTERM)}, seconds=0.02)
    other = start(run_group, several(1, 2), seconds=0.02)
    told.result()
    other.result()
    status = [json.loads((tmp_path / "run" / "groups" / str(i) / "status.json").read_text()) for i in range(2)]
    assert (status[0]["status"], status[0]["step"]) == ("preempted", 6)
    assert (status[1]["status"], status[1]["step"]) == ("finished", 20)
    lines = metrics(tmp_path / "run" / "groups" / "1")
    assert [line["replica.groups"] for line in lines] == [2] * 6 + [1] * 14
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-20", "step-6"]


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [{"dp_shard": 2}, {"tp": 2}, {"pp": 2}], ids=["fsdp", "tp", "pp"])
def test_groups_of_two_ranks(tiny, tmp_path, several, start, degrees):
    alone, again = tmp_path / "alone", tmp_path / "again"

    def until_it_is_back():
        alone.touch()
        wait_until(again.exists)

    at = {8: until_it_is_back, 9: lambda: time.sleep(2)}
    first = start(run_ranks, 2, run_group, several(0, 2, **layout(**degrees)), at=at, seconds=0.02)
    killed = start(run_ranks, 2, run_group, several(1, 2, **layout(**degrees)), during={5: die})
    assert killed.wait() == 1
    wait_until(alone.exists)
    back = start(run_ranks, 2, run_group, several(1, 2, **layout(**degrees)), joining=again)
    for parameters in zip(first.result(), back.result(), strict=True):
        assert_equal(parameters)
    whole = train(tiny, tmp_path / "whole", precision=FLOAT64)
    assert_same_curve(metrics(tmp_path / "run" / "groups" / "0"), whole)


@pytest.mark.parametrize("method", ["diloco", pytest.param("local_sgd", marks=pytest.mark.slow)])
def test_groups_that_are_averaged_are_alike_after_it_and_resume_exactly(tmp_path, several, start, method):
    averaging = AveragingConfig(method=method, every=4, groups=2)
    changes = {"replica.averaging": averaging, "checkpoint.every": 6, "schedule.total_steps": 12}

    def run_both(output, steps):
        options = {"training.steps": steps, "output": str(tmp_path / output)}
        groups = [start(run_group, change(several(i, 2, **changes), **options)) for i in range(2)]
        return [group.result() for group in groups]

    whole = run_both("whole", 12)
    assert_equal(whole)
    run_both("run", 8)
    for group in range(2):  # as if it had been killed after the checkpoint between two averages
        shutil.rmtree(tmp_path / "run" / "groups" / str(group) / "checkpoints" / "step-8")
    assert_equal([*run_both("run", 12), *whole])
    for group in range(2):
        found, expected = (curve(metrics(tmp_path / name / "groups" / str(group))) for name in ("run", "whole"))
        assert found == expected
    first, second = (curve(metrics(tmp_path / "run" / "groups" / str(group))) for group in range(2))
    assert first != second  # each reads its own share
    read = rows_read(tmp_path / "run", 2)
    assert read == rows_read(tmp_path / "whole", 2)
    assert all(len(set(ids)) == 12 for ids in read.values())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data.kind": "stream"}, "data.kind stream has no rows to deal anew"),
        ({"guard.policy": "rewind"}, "guard.policy rewind goes back to a checkpoint"),
        ({"output": None}, "name it with --output"),
        ({"training.global_batch_size": 1}, "smaller than 2 replica groups"),
        ({"parallel.cpu_offload": True, "device": "cuda"}, "parallel.cpu_offload keeps gradients"),
        ({"replica.group": 2}, "replica.group is 2"),
        ({"replica.min_groups": 3}, "replica.min_groups is 3"),
        ({"replica.groups": 1, "replica.min_groups": 2}, "replica is set and has no effect with one group"),
        ({"replica.averaging.every": 5}, "has no effect without --replica.averaging.method"),
        ({"replica.averaging": AveragingConfig(method="diloco", every=3)}, "no multiple of replica.averaging.every"),
        ({"replica.averaging": AveragingConfig(method="diloco", every=4, fragments=3)}, "does not divide"),
        ({"replica.averaging": AveragingConfig(method="local_sgd", every=4, outer_lr=0.5)}, "are diloco's"),
        ({"replica.averaging": AveragingConfig(method="diloco", every=4, groups=3)}, "start as many groups"),
    ],
)
def test_what_does_not_go_with_groups_is_refused(tiny, changes, says):
    config = change(tiny, **{"output": "run", "replica.groups": 2, **changes})
    assert any(says in problem for problem in problems(config, 1)), problems(config, 1)


def test_without_torchft_a_run_of_groups_names_the_command_that_installs_it(tiny, tmp_path):
    def without_torchft():
        sys.modules["torchft"] = None

    flags = ["--replica.groups", 2, "--output", tmp_path / "run", "--data.source", tiny.data.source, "--device", "cpu"]
    ended = titan_train(*flags, setup=without_torchft)
    assert ended.returncode == 1
    assert "pip install 'torchft" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def commands():
    text = README.read_text().partition("## Replica groups")[2].partition("\n## ")[0]
    typed = re.findall(r"^ *((?:torchrun|torchft_lighthouse) .*)", text.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line) for line in typed]


@pytest.mark.parametrize("command", [line for line in commands() if "titan_train" in line], ids=lambda c: c[-1])
def test_the_commands_of_the_readme_are_understood(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", command[command.index("--nproc-per-node") + 1])
    assert run([*command[command.index("titan_train") + 1 :], "--print-config"]) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_the_commands_of_the_readme_train(tiny, tmp_path):
    """As typed, but for a free port, on CPUs and with a small batch."""
    listed = commands()
    lighthouse_command = next(line for line in listed if line[0] == "torchft_lighthouse")
    groups = [line for line in listed if "titan_train" in line][:2]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    environment["TORCHFT_LIGHTHOUSE"] = f"http://localhost:{port}"
    address = lighthouse_command.index("--bind") + 1
    lighthouse_command[address] = f"[::]:{port}"
    small = ["--training.steps", "4", "--training.seq-len", "32", "--training.global-batch-size", "8"]
    small += ["--metrics.log-every", "1"]
    small += ["--device", "cpu", "--data.source", tiny.data.source, "--replica.host", "localhost"]
    started = [subprocess.Popen(lighthouse_command, env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL)]
    try:
        for command in groups:
            command.insert(1, "--standalone")
            started.append(subprocess.Popen([*command, *small], env=environment, cwd=tmp_path))
        assert [process.wait(180) for process in started[1:]] == [0, 0]
    finally:
        for process in started:
            process.terminate()
            process.wait(30)
    lines = [curve(metrics(tmp_path / "runs" / "groups" / "groups" / str(group))) for group in range(2)]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 4


def wait_for_a_step(log):
    written = log.stat().st_mtime_ns if log.exists() else 0
    wait_until(lambda: log.exists() and log.stat().st_mtime_ns > written, timeout=60)


@pytest.mark.slow
def test_twenty_kills_in_a_row(tiny, tmp_path, several, start):
    moments, steps = random.Random(0), 400
    # A group that dies while others connect to it is waited for so long.
    changes = {"training.steps": steps, "checkpoint.every": 10, "replica.timeout_seconds": 4.0}
    running = {i: start(run_group, several(i, 2, **changes), seconds=0.25) for i in range(2)}
    log = {i: tmp_path / "run" / "groups" / str(i) / "metrics.jsonl" for i in range(2)}
    for _ in range(20):
        victim = moments.randrange(2)
        wait_for_a_step(log[victim])
        time.sleep(moments.uniform(0, 0.3))
        running[victim].kill()
        running[victim] = start(run_group, several(victim, 2, **changes), seconds=0.25)
    assert_equal([group.result(timeout=300) for group in running.values()])
    whole = train(tiny, tmp_path / "whole", precision=FLOAT64, **{"training.steps": steps})
    found = {}
    for path in log.values():
        found |= {line["step"]: line for line in map(json.loads, path.read_text().splitlines())}
    assert_same_curve([found[step] for step in range(1, steps + 1)], whole)
