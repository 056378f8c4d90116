import time

import torch

from titan_metrics.accumulator import Accumulator, DeferredLog, Over
from titan_metrics.jsonl import JsonlSink
from titan_metrics.meter import Meter
from titan_metrics.sinks import Sinks
from titan_metrics.spans import Spans

STEPS = 10_000


def test_measuring_and_recording_every_step_costs_next_to_nothing(tmp_path):
    """The aim is 50 microseconds of CPU a step (`benchmarks/metrics_overhead.py`); a busy machine takes longer."""
    meter = Meter(flops_per_token=6e9, peak_flops=1e15, devices=8)
    accumulator = Accumulator({"loss": Over(steps="mean"), "grad_norm": Over()})
    loss = torch.tensor(3.1)
    with (
        Sinks({"jsonl": JsonlSink(tmp_path / "metrics.jsonl")}) as sinks,
        Spans(tmp_path / "spans.jsonl") as spans,
    ):
        log = DeferredLog(sinks)
        start = time.process_time()
        for step in range(1, STEPS + 1):
            spans.step = step
            for phase in ("data_wait", "forward_backward", "optimizer"):
                with spans.span(phase):
                    pass
            accumulator.add(loss=loss, grad_norm=loss)
            meter.add(tokens=8192)
            if step % 10 == 0:
                log.log(step, meter.read() | spans.read(), accumulator.read())
        spans.flush()
        seconds = time.process_time() - start
    assert len((tmp_path / "spans.jsonl").read_text().splitlines()) == 1 + 3 * STEPS
    assert seconds / STEPS < 250e-6
