"""What a run records, where it shows it, and what watches over it; torch-free, so that a login node can check it.

All of it is about *where* a run is seen: nothing here changes what is computed.
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Which sinks get a run's metrics and how often."""

    log_every: int = 10
    """Steps between two logged lines; the first and the last step should be logged as well."""

    console: bool = True
    """Show progress on standard output: a bar with an ETA on a terminal, plain lines elsewhere."""

    tensorboard: bool = False
    """Write event files to the run directory's `tensorboard` folder (needs `titan-metrics[tensorboard]`)."""

    wandb: bool = False
    """Log to Weights & Biases (needs `titan-metrics[wandb]`)."""

    wandb_project: str = "titan"
    """The Weights & Biases project that the run belongs to."""

    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """`offline` writes the W&B run below the run directory and sends nothing; `wandb sync` sends it later. None: as
    WANDB_MODE in the environment says, else online."""

    peak_tflops: float | None = None
    """The device's dense peak in TFLOP/s, the denominator of MFU. None looks it up by the device's name; an
    unknown device has no MFU."""

    norms_every: int = 0
    """Steps between two records of each layer's norms of gradient, parameters and update; 0: never. The steps that
    record them keep a copy of this rank's parameters until the optimizer has stepped."""

    def problems(self) -> list[str]:
        """Every value that cannot be used, each as one sentence with its remedy; empty if there is none."""
        problems = []
        if self.log_every < 1:
            problems.append(f"metrics.log_every is {self.log_every}; it must be at least 1.")
        if self.norms_every < 0:
            problems.append(f"metrics.norms_every is {self.norms_every}; it must be at least 1, or 0 for never.")
        if self.peak_tflops is not None and not (math.isfinite(self.peak_tflops) and self.peak_tflops > 0):
            problems.append(
                f"metrics.peak_tflops is {self.peak_tflops}; give the peak of one device in TFLOP/s, or leave it out "
                "to have it looked up."
            )
        if self.wandb and not self.wandb_project:
            problems.append("metrics.wandb_project is empty; name the W&B project that the run belongs to.")
        return problems


@dataclass(frozen=True, kw_only=True)
class SpansConfig:
    """Whether the phases of each step are written down, by each rank, for a timeline and the search for stragglers."""

    enabled: bool = False
    """Write `spans/rank-N.jsonl` in the run directory; `titan-trace` reads it. The shares of time in the metrics are
    measured either way."""

    ranks: tuple[int, ...] = ()
    """The ranks that write; all if none is named."""

    waits: bool = True
    """Also measure how long each phase waits for other ranks, where the host does: with gloo, not with NCCL. It is
    what tells a slow rank from those that wait for it."""

    flush_seconds: float = 1.0
    """How long a line may stay in memory."""

    def problems(self) -> list[str]:
        """Every value that cannot be used, each as one sentence with its remedy; empty if there is none."""
        problems = []
        if self.ranks and not self.enabled:
            problems.append(
                "spans.ranks says who writes spans, and spans.enabled is off; switch it on, or leave it out."
            )
        if not self.flush_seconds > 0:
            problems.append(f"spans.flush_seconds is {self.flush_seconds}; it must be greater than 0.")
        return problems + _bad_ranks("spans.ranks", self.ranks)


@dataclass(frozen=True, kw_only=True)
class ProfilingConfig:
    """At which steps the profiler runs and memory is photographed; files go to the run directory's `dumps`."""

    profile_at: int = 0
    """The first step to profile, counted from 1; 0: none."""

    profile_steps: int = 3
    """How many steps a profile covers."""

    profile_every: int = 0
    """Steps between the starts of two profiles; 0: one profile only."""

    profile_ranks: tuple[int, ...] = (0,)
    """The ranks that profile; all if none is named."""

    profile_stacks: bool = False
    """Record the Python stack of each operator: slower, and large files."""

    snapshot_at: int = 0
    """The step after which the memory of a GPU is photographed with the stacks that allocated it; 0: never."""

    snapshot_on_oom: bool = False
    """Photograph the memory of a GPU when it runs out."""

    snapshot_entries: int = 100_000
    """How many allocations and frees a photograph remembers."""

    def problems(self) -> list[str]:
        """Every value that cannot be used, each as one sentence with its remedy; empty if there is none."""
        least = {"profile_at": 0, "profile_steps": 1, "profile_every": 0, "snapshot_at": 0, "snapshot_entries": 1}
        problems = [
            f"profiling.{name} is {getattr(self, name)}; it must be at least {bound}."
            for name, bound in least.items()
            if getattr(self, name) < bound
        ]
        if self.profile_at == 0:
            names = ("profile_steps", "profile_every", "profile_ranks", "profile_stacks")
            given = [f"profiling.{name}" for name in names if getattr(self, name) != getattr(ProfilingConfig, name)]
            if given:
                problems.append(f"{', '.join(given)} say how to profile, and profiling.profile_at is 0: give a step.")
        if 0 < self.profile_every < self.profile_steps:
            problems.append(
                f"profiling.profile_every is {self.profile_every}, but a profile takes profiling.profile_steps "
                f"{self.profile_steps} steps; make it at least as many, or 0 for a single profile."
            )
        return problems + _bad_ranks("profiling.profile_ranks", self.profile_ranks)


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """What happens when no step ends: stacks and pending collectives are written down, and the process can end."""

    stall_seconds: float = 0.0
    """After so long without the end of a step, write every thread's stack and the collectives under way to `dumps`;
    0: never. The first step is not watched, since it may compile."""

    exit_seconds: float = 0.0
    """After so long without the end of a step, say which rank is missing and end the process; 0: never. Must leave
    room for validation and for saving a checkpoint."""

    exit_code: int = 124
    """The exit code of a process that its watchdog ends, by default that of timeout(1)."""

    heartbeat_seconds: float = 5.0
    """How often each rank says in `heartbeats` that it is alive."""

    def problems(self) -> list[str]:
        """Every value that cannot be used, each as one sentence with its remedy; empty if there is none."""
        problems = [
            f"watchdog.{name} is {getattr(self, name)}; it must be at least 0."
            for name in ("stall_seconds", "exit_seconds")
            if not getattr(self, name) >= 0
        ]
        if not self.heartbeat_seconds > 0:
            problems.append(f"watchdog.heartbeat_seconds is {self.heartbeat_seconds}; it must be greater than 0.")
        if 0 < self.exit_seconds < self.stall_seconds:
            problems.append(
                f"watchdog.exit_seconds is {self.exit_seconds}, less than watchdog.stall_seconds {self.stall_seconds}: "
                "the process would end before it could write its stacks. Make it greater, or 0."
            )
        if not 1 <= self.exit_code <= 255:
            problems.append(f"watchdog.exit_code is {self.exit_code}; it must be 1 to 255.")
        return problems

    @property
    def enabled(self) -> bool:
        """Whether anything is to be done when no step ends."""
        return self.stall_seconds > 0 or self.exit_seconds > 0


@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """Slow checks for a run that goes wrong."""

    anomaly: bool = False
    """Let autograd say which forward operation led to a NaN in the backward pass. Every step becomes much slower."""

    locate_nonfinite: bool = False
    """Watch every module's inputs, outputs and gradients, and stop at the first step in which one is NaN or infinite,
    with the name of the module and the rank."""

    check_replicas_every: int = 0
    """Steps between two comparisons of the parameters that ranks hold copies of; 0: never. Copies that differ by a
    single bit end the run, with their names and ranks."""

    def problems(self) -> list[str]:
        """Every value that cannot be used, each as one sentence with its remedy; empty if there is none."""
        if self.check_replicas_every < 0:
            return [
                f"debug.check_replicas_every is {self.check_replicas_every}; it must be at least 1, or 0 for never."
            ]
        return []


def _bad_ranks(name: str, ranks: tuple[int, ...]) -> list[str]:
    bad = [rank for rank in ranks if rank < 0]
    return [f"{name} has {bad[0]}; ranks are counted from 0."] if bad else []
