"""What is written down of a run beside its metrics, and what watches over it.

Spans of each phase, the ledger of where time went, the machine it ran on; the profiler, the watchdog and the checks
that a configuration asks for. What is off costs nothing.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Self

import torch
from torch import nn

from titan_metrics.accumulator import Reading
from titan_metrics.goodput import Ledger
from titan_metrics.machine import write_environment
from titan_metrics.nonfinite import NonFiniteWatch
from titan_metrics.norms import ParameterNorms
from titan_metrics.profiling import MemorySnapshots, Profiler
from titan_metrics.replicas import check_replicas
from titan_metrics.spans import Spans
from titan_metrics.waits import measure_clock_offset, timed_waits
from titan_metrics.watchdog import Watchdog
from titan_train.config import TrainConfig
from titan_train.environment import Environment
from titan_train.run_directory import own_folder


class Recorder:
    """One process's, from the moment its run directory is known; to be entered."""

    def __init__(self, config: TrainConfig, env: Environment) -> None:
        self._config, self._env, self._directory = config, env, own_folder(config)
        self._cleanup = contextlib.ExitStack()
        self._ledger: Ledger | None = None
        self._norms: ParameterNorms | None = None
        self._snapshots: MemorySnapshots | None = None
        self._watchdog: Watchdog | None = None
        self._nonfinite: NonFiniteWatch | None = None
        self._parts: list[tuple[str, nn.Parameter]] = []
        self._profiler = Profiler(self._directory, config.profiling, env.rank)
        self._reading: Reading | None = None
        self._aside_seconds = 0.0
        chosen, together = config.spans, env.meshes is not None
        written = chosen.enabled and (not chosen.ranks or env.rank in chosen.ranks)
        self.spans = Spans(
            self._directory / "spans" / f"rank-{env.rank}.jsonl" if written else None,
            rank=env.rank,
            world_size=env.degrees.world_size,
            clock_offset=measure_clock_offset() if chosen.enabled and together else None,
            flush_seconds=chosen.flush_seconds,
        )

    def __enter__(self) -> Self:
        config, env, enter = self._config, self._env, self._cleanup.enter_context
        self._cleanup.callback(self.spans.close)
        if env.is_main:
            self._ledger = Ledger(self._directory / "goodput.jsonl")
            self._cleanup.callback(self._ledger.close)
            write_environment(self._directory / "environment.json", layout=dataclasses.asdict(env.degrees))
        self.record("start")
        self._cleanup.callback(lambda: self.record("end"))
        if config.spans.enabled and config.spans.waits and env.meshes is not None:
            enter(timed_waits(self.spans))
        if config.debug.anomaly:
            enter(torch.autograd.set_detect_anomaly(True))
        self._cleanup.callback(self._profiler.close)
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def record(self, event: str, *, step: int | None = None, seconds: float | None = None) -> None:
        """Enters an event in the ledger of the run."""
        if self._ledger is not None:
            self._ledger.record(event, step=step, seconds=seconds)

    def ready(self, model: nn.Module, step: int) -> None:
        """The model has its weights, and step `step` is behind it: from now on steps are watched."""
        config, env, enter = self._config, self._env, self._cleanup.enter_context
        self.record("ready", step=step)
        self._parts = list(model.named_parameters())
        if config.metrics.norms_every:
            self._norms = ParameterNorms(self._parts)
        if config.profiling.snapshot_at or config.profiling.snapshot_on_oom:
            self._snapshots = MemorySnapshots(self._directory, config.profiling, env.rank)
            self._cleanup.callback(self._snapshots.close)
        if config.debug.locate_nonfinite:
            self._nonfinite = enter(NonFiniteWatch(model))
        if config.watchdog.enabled:
            self._watchdog = enter(
                Watchdog(
                    self._directory,
                    config.watchdog,
                    rank=env.rank,
                    world_size=env.degrees.world_size,
                    phases=self.spans.open,
                    before_exit=self.spans.flush,
                )
            )

    # ---- A step, in its order

    def begin_step(self, number: int) -> None:
        """Step `number` begins."""
        self.spans.step = number
        self._profiler.begin_step(number)

    def after_backward(self) -> None:
        """Gradients are there.

        Raises:
            NonFiniteError: on every rank, if something in the step was NaN or infinite and that is watched.
        """
        if self._nonfinite is not None:
            self._nonfinite.check()

    @contextlib.contextmanager
    def update(self, number: int) -> Iterator[None]:
        """Clipping and the optimizer's step happen within it."""
        due = self._norms is not None and number % self._config.metrics.norms_every == 0
        with self.spans.span("optimizer"):
            if due and self._norms is not None:
                self._norms.before_update()
            yield
            if due and self._norms is not None:
                self._reading = self._norms.after_update()

    def take_norms(self) -> Reading | None:
        """Norms of the step's layers, if they were measured; once."""
        reading, self._reading = self._reading, None
        return reading

    def end_step(self, number: int) -> None:
        """Step `number` has ended.

        Raises:
            ReplicasDifferError: on every rank, if copies of parameters differ and that is checked.
        """
        self._profiler.end_step(number)
        if self._snapshots is not None:
            self._snapshots.end_step(number)
        every = self._config.debug.check_replicas_every
        if every and number % every == 0 and self._env.meshes is not None:
            check_replicas(self._parts)
        if self._watchdog is not None:
            self._watchdog.end_step(number)

    @contextlib.contextmanager
    def aside(self, name: str, event: str, step: int) -> Iterator[None]:
        """Something beside training, which takes as long as it takes: a span and an event in the ledger."""
        if self._env.device.type == "cuda":
            torch.cuda.synchronize(self._env.device)  # what it still does is of the step before, and not aside
        started = time.perf_counter()
        with self._watchdog.paused() if self._watchdog is not None else contextlib.nullcontext(), self.spans.span(name):
            yield
        seconds = time.perf_counter() - started
        self._aside_seconds += seconds
        self.record(event, step=step, seconds=seconds)

    def take_aside_seconds(self) -> float:
        """How long this process did something beside training since the last call."""
        seconds, self._aside_seconds = self._aside_seconds, 0.0
        return seconds
