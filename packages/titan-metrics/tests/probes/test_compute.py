import pytest
import torch

from titan_metrics.probes import timing
from titan_metrics.probes.compute import copy_bandwidth, matmul_rate
from titan_metrics.probes.timing import median_seconds

CPU = torch.device("cpu")


def test_the_median_of_what_is_measured_after_warming_up(monkeypatch):
    now = 0.0

    def take(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    each = iter([100.0, 100.0, 1.0, 2.0, 9.0])
    seconds = median_seconds(lambda: take(next(each)), CPU, repetitions=3, before=lambda: take(50.0))
    assert seconds == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_counts_two_operations_for_each_of_its_terms(monkeypatch, dtype):
    clock = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))  # every product takes a second
    assert matmul_rate(CPU, dtype, size=64, repetitions=3) == 2 * 64**3


def test_a_copy_reads_and_writes(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert copy_bandwidth(CPU, num_bytes=1000, repetitions=3) == 2000


@pytest.mark.gpu
def test_a_gpu_is_waited_for():
    """What only enqueues would seem many times as fast as any device there is."""
    assert 1e11 < matmul_rate(torch.device("cuda"), torch.bfloat16, size=8192, repetitions=5) < 5e15
    assert 1e10 < copy_bandwidth(torch.device("cuda"), num_bytes=2**30, repetitions=5) < 5e13
