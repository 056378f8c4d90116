"""`titan-train --dry-run`: the memory of the heaviest rank, without its memory."""

import dataclasses
import re

import pytest

from runs import TINY, change, layout, titan_train
from titan_core.memory_use import MemoryUse
from titan_models.facts import parameter_count
from titan_train.dry_run import DryRun, dry_run, dry_run_text
from titan_train.forked import ProcessError


def test_the_command_finds_the_memory_of_a_large_model_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Eighty gigabytes of parameters, in seconds.
    flags = "--model.layers=2 --model.dim=16384 --model.hidden-dim=200000 --model.heads=128 --model.head-dim=128"
    flags += " --model.kv-heads=8 --parallel.tp=8 --training.global-batch-size=8 --data.source=nowhere"
    done = titan_train("--dry-run", "--world-size", 64, *flags.split())
    assert (done.returncode, done.stderr) == (0, "")
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
    assert "the first of each pipeline stage tried" in dry_run_text(config, 4)


def test_the_heaviest_rank_has_most_in_total():
    memory = {0: MemoryUse(parameters=5), 4: MemoryUse(activations=9), 8: MemoryUse(parameters=6, other=1)}
    assert DryRun(world_size=12, memory=memory, seconds=0.0).heaviest == 4


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
