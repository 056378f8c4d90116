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
    assert 60 * MIB < during["memory.used"] - before["memory.used"] < 80 * MIB
    assert after["memory.used"] < during["memory.used"] - 50 * MIB
    assert after["memory.peak"] >= during["memory.used"] - 4 * MIB


def test_the_peak_is_this_programs_own():
    # A program inherits the rusage peak of the (larger) one that started it.
    code = "from titan_metrics.memory import memory; print(memory('cpu')['memory.peak'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 4 * MIB < int(run.stdout) < 64 * MIB < memory("cpu")["memory.peak"]


def test_macos_counts_in_bytes(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory("cpu") == {"memory.peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


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
        "memory.used": 1,
        "memory.peak": 2,
        "memory.reserved_peak": 3,
        "allocator.retries": 4,
        "allocator.ooms": 5,
    }
    assert calls == ["read", "reset"]


@pytest.mark.gpu
def test_a_gpus_peak_is_that_since_the_last_reading():
    memory("cuda")
    block = torch.empty(32 * MIB, dtype=torch.uint8, device="cuda")
    del block
    first, second = memory("cuda"), memory("cuda")
    assert first["memory.peak"] - second["memory.peak"] >= 32 * MIB
    assert first["memory.used"] == second["memory.used"]


def test_another_type_of_device_is_refused():
    with pytest.raises(ValueError, match="mps"):
        memory("mps")
