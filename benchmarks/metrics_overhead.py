"""What watching a run costs its host: CPU time of one step's metrics and spans, over steps that do nothing else.

    uv run python benchmarks/metrics_overhead.py            # half a minute

A step opens four spans (one inside another), hands two scalars to the accumulator and counts its tokens. Every tenth is
read, reduced and logged, with memory, to `metrics.jsonl`; spans go to a file. The second figure logs every step.
Counted is the CPU time of the whole process, the thread that writes spans included, divided by the steps; the figure is
the median of the rounds. The device is a CPU: on a GPU the accumulator's reading adds a few kernel launches.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from titan_metrics.accumulator import Accumulator, DeferredLog, Over
from titan_metrics.jsonl import JsonlSink
from titan_metrics.memory import memory
from titan_metrics.meter import Meter
from titan_metrics.sinks import Sinks
from titan_metrics.spans import Spans


def seconds_a_step(folder: Path, steps: int, log_every: int) -> float:
    """CPU seconds of this process for each of `steps` steps."""
    meter = Meter(flops_per_token=6e9, peak_flops=1e15, devices=8)
    accumulator = Accumulator({"loss": Over(steps="mean", ranks="sum"), "grad_norm": Over()}, lambda tensor, _: tensor)
    loss = torch.tensor(3.1)
    with Sinks({"jsonl": JsonlSink(folder / "metrics.jsonl")}) as sinks, Spans(folder / "spans.jsonl") as spans:
        log, span = DeferredLog(sinks), spans.span
        start = time.process_time()
        for step in range(1, steps + 1):
            spans.step = step
            with span("data_wait"):
                pass
            with span("forward_backward"), span("forward", stage=0, micro_batch=0):
                pass
            with span("optimizer"):
                pass
            accumulator.add(loss=loss, grad_norm=loss)
            meter.add(tokens=8192, data_wait_seconds=0.001)
            if step % log_every == 0:
                values = {"lr": 3e-4, **meter.read(), **spans.read(), **memory("cpu")}
                log.log(step, values, accumulator.read())
        log.flush()
        spans.flush()
        return (time.process_time() - start) / steps


def main() -> None:
    """Prints the medians and their ranges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for every in (10, 1):
        found = []
        for _ in range(given.rounds):
            with tempfile.TemporaryDirectory() as folder:
                found.append(seconds_a_step(Path(folder), given.steps, every) * 1e6)
        print(
            f"logged every {every}: {statistics.median(found):.1f} [{min(found):.1f}, {max(found):.1f}] "
            f"microseconds of CPU a step, {given.steps:,} steps, {given.rounds} rounds"
        )


if __name__ == "__main__":
    main()
