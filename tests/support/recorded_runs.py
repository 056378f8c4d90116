"""Run directories for tests of what reads them, made by the package's own writers without a training run."""

import contextlib
import math
import subprocess
import sys

from titan_metrics.goodput import Ledger
from titan_metrics.jsonl import JsonlSink
from titan_metrics.spans import Spans

START = 1_790_000_000.0
CONFIG = {
    "type": "titan_train.config:TrainConfig",
    "output": None,
    "training": {"type": "titan_train.config:TrainingConfig", "steps": 60, "seed": 0},
    "optimizer": {"lr": 1e-3, "no_decay": ["*_norm.weight"]},
}


def metrics_of(step, *, lr=1e-3):
    """A logged step with every kind of metric that titan-train logs."""
    loss = 2 + 6 * math.exp(-step / 15) + 0.05 * math.sin(step)
    values = {
        "time": START + 10 + 2.0 * step,
        "loss": loss,
        "loss_max": loss + 0.1,
        "grad_norm": 1 + 1 / step,
        "lr": lr * min(step / 10, 1),
        "tokens": 4096 * step,
        "tokens_per_second": 2048.0 + step % 7,
        "tokens_per_second_per_device": 512.0,
        "tflops_per_device": 210.5,
        "mfu": 0.41 + 0.001 * (step % 5),
        "step_seconds": 2.0,
        "data_wait_share": 0.01,
        "epoch": step / 60,
        "epoch.books": step / 30,
        "memory.used": 4.0e9,
        "memory.peak": 6.5e9 + step,
        "allocator.retries": 0,
        "time.forward_backward": 1.6,
        "time.optimizer": 0.3,
        "time.other": 0.1,
        "checkpoint_seconds": 0.5 if step % 20 == 0 else 0.0,
        "expert_load_max": 1.5,
    }
    if step % 20 == 0:
        values |= {"validation.web.loss": loss + 0.2, "validation.code.loss": loss - 0.2, "time.validation": 0.4}
        for layer in ("layers.0", "layers.1"):
            values |= {
                f"norms.gradient.{layer}": 0.5 + 1 / step,
                f"norms.parameter.{layer}": 20.0,
                f"norms.update.{layer}": 0.02,
            }
    return values


def write_metrics(folder, steps, **options):
    folder.mkdir(parents=True, exist_ok=True)
    sink = JsonlSink(folder / "metrics.jsonl")
    for step in steps:
        sink.log(step, metrics_of(step, **options))
    sink.close()


def write_ledger(folder):
    """Two starts of a run of 60 steps, of which 41 to 50 were done again."""
    now = START

    def later(seconds):
        nonlocal now
        now += seconds

    def clock():
        return now

    first = Ledger(folder / "goodput.jsonl", clock)
    first.record("start")
    later(10)
    first.record("ready", step=0)
    for step in (20, 40):
        later(40)
        first.record("step", step=step, seconds=40.0)
        later(2)
        first.record("save", step=step, seconds=2.0)
    later(20)
    first.record("step", step=50, seconds=20.0)
    first.close()
    later(30)
    second = Ledger(folder / "goodput.jsonl", clock)
    second.record("start")
    later(8)
    second.record("restore", seconds=3.0)
    second.record("ready", step=40)
    later(40)
    second.record("step", step=60, seconds=40.0)
    second.record("end", step=60)
    second.close()


def write_spans(folder, *, ranks=4, slow=None, steps=range(51, 61)):
    """Spans of `ranks`, on a clock of their own; the rank `slow` waits 50 ms longer for its data."""
    now = 0.0

    def clock():
        return now

    for rank in range(ranks):
        now = 0.0
        spans = Spans(folder / "spans" / f"rank-{rank}.jsonl", rank=rank, world_size=ranks, clock=clock)
        for step in steps:
            spans.step = step
            late = 0.05 if rank == slow else 0.0
            with spans.span("data_wait"):
                now += 0.005 + late
            with spans.span("forward_backward"):
                for micro_batch in range(2):
                    with spans.span("forward", micro_batch=micro_batch):
                        now += 0.04
                spans.wait(0.05 - late)
                now += 0.05 - late
            with spans.span("optimizer"):
                now += 0.03
        spans.close()


@contextlib.contextmanager
def served(*runs):
    """`titan-report --serve` of `runs` in a process of its own, on a free port: the process, the page's address."""
    command = [sys.executable, "-m", "titan_metrics.report", *map(str, runs), "--serve", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, process.stdout.readline().split()[0]
        finally:
            process.kill()
