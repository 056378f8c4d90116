"""`titan-train --dry-run`: the memory of the heaviest rank, without its memory."""

import dataclasses
import os
import re

import pytest

from titan_core.planning.memory_use import MemoryUse
from titan_core.text import human
from titan_models.facts import parameter_count
from titan_train.dry_run import DryRun, dry_run, dry_run_text
from titan_train.forked import ProcessError
from training_runs import TINY, change, layout, titan_train

PROGRESS = r".+: \d+ of \d+ done after \d+ s\n"  # on a busy machine


def test_the_command_finds_the_memory_of_a_large_model_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Eighty gigabytes of parameters, in seconds.
    flags = "--model.layers=2 --model.dim=16384 --model.hidden-dim=200000 --model.heads=128 --model.head-dim=128"
    flags += " --model.kv-heads=8 --parallel.tp=8 --training.global-batch-size=8 --data.source=nowhere"
    done = titan_train("--dry-run", "--world-size", 64, *flags.split())
    assert (done.returncode, re.sub(PROGRESS, "", done.stderr)) == (0, "")
    sizes = dict(re.findall(r"^  (\w+) +([\d.]+ \w+)  ", done.stdout, re.MULTILINE))
    assert list(sizes) == [*(field.name for field in dataclasses.fields(MemoryUse)), "peak"]
    assert sizes["parameters"] == "1.22 GiB"
    assert sizes["optimizer"] == "2.44 GiB"
    assert "Rank 0 needs most" in done.stdout
    assert "mask of S x S" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_heaviest_of_the_pipelines_ranks_is_shown():
    config = change(TINY, **{"model.layers": 4, "training.micro_batch_size": 3, **layout(pp=4)})
    found = dry_run(config, 4)
    assert set(found.memory) >= {0, 3}
    assert all(use.parameters for use in found.memory.values())
    assert sum(use.parameters for use in found.memory.values()) <= 4 * parameter_count(config.model)
    assert found.memory[found.heaviest].total == max(use.total for use in found.memory.values())
    assert "the first of each pipeline rank tried" in dry_run_text(config, 4)


def test_the_heaviest_rank_has_most_in_total():
    memory = {0: MemoryUse(parameters=5), 4: MemoryUse(activations=9), 8: MemoryUse(parameters=6, other=1)}
    host = {0: MemoryUse(parameters=50), 4: MemoryUse(), 8: MemoryUse()}
    assert DryRun(world_size=12, memory=memory, host_memory=host, traffic={}, seconds=0.0).heaviest == 4


def test_the_hosts_memory_is_shown_apart():
    config = change(TINY, device="cuda", **layout(cpu_offload=True))
    found = dry_run(config, 2)
    text = dry_run_text(config, 2)
    gpu, host = text.split("In the host's memory, rank 0 needs beside:")
    assert "Rank 0 needs most on its GPU:" in " ".join(gpu.split())
    peaks = [re.search(r"^  peak +([\d.]+ \w+)", part, re.MULTILINE)[1] for part in (gpu, host)]
    assert peaks == [human(found.memory[0].total), human(found.host_memory[0].total)]
    assert found.host_memory[0].optimizer > 0 == found.memory[0].optimizer
    without = dry_run(change(TINY, device="cuda"), 2).memory[0].total
    assert found.memory[0].total < without - found.host_memory[0].optimizer
    assert "host's memory" not in dry_run_text(change(TINY, device="cuda"), 2)


def test_a_dry_run_fits_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    config = change(TINY, device="cuda", **{"model.layers": 4, **layout(pp=2, cpu_offload=True)})
    text = dry_run_text(config, 4)
    assert max(map(len, text.splitlines())) <= 80


IMPOSSIBLE = {
    "0B0,0F0,0F1,0B1\n1F0,1B0,1F1,1B1": r"line 1: 0B0 stands before 0F0, but a forward comes before its backward",
    "0F0,0F1,0W0,0I0,0I1,0W1\n1F0,1I0,1F1,1I1,1W0,1W1": r"line 1: 0W0 stands before 0I0",
    "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1": r"never ends, because ranks wait for each other: line 1 at 0B0 for 1B0",
    "0F0,0F1,0B0,0B1\n1F1,1B1,1F0,1B0": r"line 2: 1F1 stands before 1F0, but torch runs the forwards",
}


@pytest.mark.parametrize("rows", IMPOSSIBLE)
def test_schedules_that_cannot_run_are_refused(tmp_path, rows):
    path = tmp_path / "schedule.csv"
    path.write_text(rows)
    flags = ["--training.global-batch-size=2", "--training.micro-batch-size=1", "--parallel.pp=2"]
    for way in (["--explain", "--world-size=2"], ["--dry-run", "--world-size=2"]):
        done = titan_train(*way, *flags, f"--parallel.pp-schedule-csv={path}")
        assert (done.returncode, done.stdout) == (2, "")
        assert IMPOSSIBLE[rows] in done.stderr
        assert f"{path}" in done.stderr
        assert "Traceback" not in done.stderr
    # A run is checked alike, before it looks for the other ranks.
    done = titan_train(*flags, f"--parallel.pp-schedule-csv={path}", setup=lambda: os.environ.update(WORLD_SIZE="2"))
    assert done.returncode == 2
    assert IMPOSSIBLE[rows] in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dry-run", "--world-size=8", "--parallel.tp=3"], "parallel.tp 3 does not divide the 8 ranks"),
        (["--explain", "--world-size=2", "--parallel.pp=2", "--parallel.pp-split=nothing"], "names 'nothing'"),
        (["--dry-run", "--world-size=2", "--parallel.pp=2", "--parallel.pp-split=nothing"], "names 'nothing'"),
        (["--dry-run", "--world-size=0"], "--world-size is 0"),
        (["--world-size=8"], "--world-size is a supposition for --explain and --dry-run"),
    ],
)
def test_what_cannot_run_is_refused(flags, message):
    done = titan_train(*flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_both_can_be_asked_for_at_once():
    done = titan_train("--dry-run", "--explain", "--model.layers=1", "--training.seq-len=16")
    assert done.returncode == 0
    assert done.stdout.startswith("mesh\n  1 rank: nothing is shared")
    assert "A training step on 1 rank of fake tensors" in done.stdout


def test_a_killed_helper_is_reported(monkeypatch):
    def killed(*_):
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("titan_train.rehearsal.rehearse", killed)
    with pytest.raises(ProcessError, match=r"exit code -9 and no result"):
        dry_run(TINY, 1)
