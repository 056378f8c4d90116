import time

from titan_metrics.jsonl import JsonlSink
from titan_metrics.meter import Meter
from titan_metrics.sinks import Sinks

STEPS = 10_000


def test_measuring_and_recording_every_step_costs_next_to_nothing(tmp_path):
    """Prints the CPU time a step (`pytest -s`); the aim is 50 microseconds, the bound allows for a busy machine."""
    meter = Meter(flops_per_token=6e9, peak_flops=1e15, devices=8)
    with Sinks({"jsonl": JsonlSink(tmp_path / "metrics.jsonl")}) as sinks:
        start = time.process_time()
        for step in range(STEPS):
            meter.add(tokens=8192, data_wait_seconds=0.001)
            sinks.log(step, {"loss": 3.1 / (step + 1), "grad_norm": 1.1, "lr": 3e-4, "tokens": 8192, **meter.read()})
        seconds = time.process_time() - start
    print(f"meter and metrics.jsonl: {seconds / STEPS * 1e6:.1f} microseconds of CPU a step")
    assert seconds / STEPS < 250e-6
