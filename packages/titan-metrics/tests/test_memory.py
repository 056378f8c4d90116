import mmap
import resource
import subprocess
import sys

import pytest
import torch

from titan_metrics.memory import memory

MIB = 2**20


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS tells a process its peak only")
def test_the_process_memory_follows_what_is_in_use():
    before = memory("cpu")
    block = mmap.mmap(-1, 64 * MIB)
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    during = memory("cpu")
    block.close()
    after = memory("cpu")
    assert 60 * MIB < during["memory_bytes"] - before["memory_bytes"] < 80 * MIB
    assert after["memory_bytes"] < during["memory_bytes"] - 50 * MIB
    assert after["memory_peak_bytes"] >= during["memory_bytes"] - 4 * MIB


def test_the_peak_is_this_programs_own():
    # A program inherits the rusage peak of the (larger) one that started it.
    code = "from titan_metrics.memory import memory; print(memory('cpu')['memory_peak_bytes'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 4 * MIB < int(run.stdout) < 64 * MIB < memory("cpu")["memory_peak_bytes"]


def test_macos_counts_in_bytes(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory("cpu") == {"memory_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def test_a_gpus_numbers_are_the_allocators(monkeypatch):
    stats = {
        "active_bytes.all.current": 1,
        "active_bytes.all.peak": 2,
        "reserved_bytes.all.peak": 3,
        "num_alloc_retries": 4,
        "num_ooms": 5,
    }
    calls = []
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: calls.append("read") or stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    assert memory("cuda") == {
        "memory_bytes": 1,
        "memory_peak_bytes": 2,
        "memory_reserved_peak_bytes": 3,
        "memory_retries": 4,
        "memory_ooms": 5,
    }
    assert calls == ["read", "reset"]


@pytest.mark.gpu
def test_a_gpus_peak_is_that_since_the_last_reading():
    memory("cuda")
    block = torch.empty(32 * MIB, dtype=torch.uint8, device="cuda")
    del block
    first, second = memory("cuda"), memory("cuda")
    assert first["memory_peak_bytes"] - second["memory_peak_bytes"] >= 32 * MIB
    assert first["memory_bytes"] == second["memory_bytes"]


def test_another_type_of_device_is_refused():
    with pytest.raises(ValueError, match="mps"):
        memory("mps")
