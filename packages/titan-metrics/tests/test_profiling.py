import gzip
import json

import pytest
import torch

from titan_metrics.config import ProfilingConfig
from titan_metrics.profiling import MemorySnapshots, NoAllocatorError, Profiler


def run(tmp_path, steps, rank=0, **options):
    profiler = Profiler(tmp_path, ProfilingConfig(**options), rank)
    for step in range(1, steps + 1):
        profiler.begin_step(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(4).sum()
        profiler.end_step(step)
    profiler.close()
    return sorted(path.name for path in (tmp_path / "dumps").glob("*"))


def names(path):
    return {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}


def test_a_profile_has_the_steps_that_were_asked_for(tmp_path):
    assert run(tmp_path, 6, profile_at=2, profile_steps=2) == ["profile-rank-0-step-3.json.gz"]
    found = names(tmp_path / "dumps/profile-rank-0-step-3.json.gz")
    assert {"step 2", "step 3", "aten::sum"} <= found
    assert not {"step 1", "step 4"} & found


def test_profiles_recur(tmp_path):
    found = run(tmp_path, 6, profile_at=1, profile_steps=1, profile_every=2)
    assert found == [f"profile-rank-0-step-{step}.json.gz" for step in (1, 3, 5)]


def test_only_chosen_ranks_profile_and_only_if_asked(tmp_path):
    assert run(tmp_path, 3, rank=1, profile_at=1, profile_steps=1) == []
    assert run(tmp_path, 3) == []
    assert run(tmp_path, 3, rank=1, profile_at=1, profile_steps=1, profile_ranks=()) == [
        "profile-rank-1-step-1.json.gz"
    ]


def test_an_unfinished_profile_is_written_at_the_end_of_the_run(tmp_path, caplog):
    assert run(tmp_path, 6, profile_at=3, profile_steps=5) == ["profile-rank-0-step-6.json.gz"]
    found = names(tmp_path / "dumps/profile-rank-0-step-6.json.gz")
    assert {"step 3", "step 6"} <= found
    assert caplog.records == []


def test_a_profile_that_was_never_made_is_told(tmp_path, caplog):
    assert run(tmp_path, 3, profile_at=30) == []
    assert run(tmp_path, 3, profile_at=30, rank=1) == run(tmp_path, 3) == []  # not asked for
    (record,) = caplog.records
    assert "profile_at is step 30, and the last step of this start was 3" in record.getMessage()


def test_a_profile_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "dumps").write_text("in the way")
    run(tmp_path, 1, profile_at=1, profile_steps=1)
    assert "rank 0 was not written" in caplog.records[0].getMessage()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_memory_cannot_be_photographed_without_a_gpu(tmp_path):
    with pytest.raises(NoAllocatorError, match="snapshot_at"):
        MemorySnapshots(tmp_path, ProfilingConfig(snapshot_at=1))


@pytest.mark.gpu
def test_memory_is_photographed_at_a_step_and_when_it_runs_out(tmp_path):
    snapshots = MemorySnapshots(tmp_path, ProfilingConfig(snapshot_at=2, snapshot_on_oom=True))
    for step in range(1, 4):
        torch.ones(1 << 20, device="cuda")
        snapshots.end_step(step)
    assert [path.name for path in (tmp_path / "dumps").iterdir()] == ["memory-rank-0-step-2.pickle"]
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 50, device="cuda")
    assert (tmp_path / "dumps/memory-rank-0-step-3.pickle").stat().st_size > 0
    snapshots.close()


@pytest.mark.gpu
def test_a_step_to_photograph_that_never_came_costs_a_warning(tmp_path, caplog):
    snapshots = MemorySnapshots(tmp_path, ProfilingConfig(snapshot_at=4))
    snapshots.end_step(3)
    snapshots.close()
    assert "profiling.snapshot_at is step 4, and the last step was 3" in caplog.text
