"""How a run is laid out, and how its optimizer and schedule behave. Imports no torch: a login node can read it.

A field whose metadata says `{"part": "how"}` may change without changing the loss curve; the others are part of
the experiment.
"""

from dataclasses import dataclass
from typing import Literal

HOW = {"part": "how"}


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many ranks share the work, and along which lines. None of it changes the loss curve."""

    dp_replicate: int = 1
    """Data-parallel replicas, each with its own copy of the (possibly sharded) parameters."""
    dp_shard: int = -1
    """Ranks over which parameters, gradients and optimizer states are sharded (FSDP2); -1: what is left."""
    tp: int = 1
    """Tensor-parallel ranks."""
    cp: int = 1
    """Context-parallel ranks."""
    pp: int = 1
    """Pipeline stages."""
    ep: int = 1
    """Expert-parallel ranks."""
    grad_sync: Literal["auto", "last", "every"] = "auto"
    """When gradients are reduced while accumulating: after `every` micro-batch, or after the `last` only, which
    communicates less but keeps whole gradients in memory. `auto` reduces over shards every time and over
    replicas last."""
    reshard_after_forward: bool = True
    """Whether FSDP frees gathered parameters between forward and backward."""
    deterministic: bool = False
    """Use only kernels that give the same bits for the same input; slower on GPUs."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and gradient clipping."""

    lr: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay rate of the first moment."""
    beta2: float = 0.95
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, times the learning rate at each step."""
    no_decay: tuple[str, ...] = ("norm", "embedding", "bias")
    """Roles without weight decay; `bias` stands for every bias. A head that shares the embedding's weight counts
    as embedding."""
    max_grad_norm: float = 1.0
    """Gradients whose global norm is larger are scaled down to it; 0 switches clipping off."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Warm-up, stable, decay: the learning rate's factor over the steps."""

    total_steps: int | None = None
    """Steps at which the decay ends; None: `training.steps` of the first run."""
    warmup_steps: int = 20
    """Steps of linear rise from 1/warmup_steps of the peak."""
    decay_ratio: float = 0.2
    """Share of total_steps spent decaying at the end."""
    decay: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay."""
    min_factor: float = 0.0
    """Factor at the end of the decay."""

    def problems(self) -> list[str]:
        """Every value out of range, each as one sentence; empty if there is none."""
        problems = []
        if self.warmup_steps < 0:
            problems.append(f"schedule.warmup_steps is {self.warmup_steps}; it must be 0 or more.")
        if not 0 <= self.decay_ratio <= 1:
            problems.append(f"schedule.decay_ratio is {self.decay_ratio}; it must lie between 0 and 1.")
        if not 0 <= self.min_factor <= 1:
            problems.append(f"schedule.min_factor is {self.min_factor}; it must lie between 0 and 1.")
        if self.total_steps is not None and self.total_steps < 1:
            problems.append(f"schedule.total_steps is {self.total_steps}; it must be at least 1.")
        return problems
