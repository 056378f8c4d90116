"""What a model can do once it is laid out on its ranks, however it is laid out."""

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor, nn

from titan_core.routers import Routers

Batch = Mapping[str, Tensor]
"""`tokens` [B, S] int64, and under the names of the model's further arguments: `positions`, `document_ids` and `labels`
[B, S] int64, `row_weights` [B]. All of this rank's rows of a step, on its device."""


OnAction = Callable[[str, int, int, float, float], None]
"""Is told what a pipeline's stage did: F (forward), B (backward), I (backward to its input) or W (to its weights); the
stage; the micro-batch; and when it began and ended on the host, in seconds of `time.perf_counter`."""


class Layout(Protocol):
    """A model laid out on its ranks, ready to train."""

    model: nn.Module
    """What this rank holds of the model: all of it, or its pipeline stages. Its names are the model's."""
    routers: Routers
    """Its routers; call their `finish_step` after each step of the optimizer."""

    def accumulate(self, batch: Batch, *, divisor: float) -> Tensor:
        """Adds up gradients of the summed loss over this rank's `batch`, divided by `divisor`; returns that loss."""

    def evaluate(self, batch: Batch) -> Tensor:
        """The summed loss over this rank's `batch`, without gradients: a float64 scalar. Call it between steps."""

    def gradient_bytes(self) -> int:
        """Bytes of whole gradients kept on this rank while micro-batches accumulate."""

    def watch(self, on_action: OnAction) -> None:
        """From now on calls `on_action` after each action of this rank's stages; does nothing without a pipeline."""
