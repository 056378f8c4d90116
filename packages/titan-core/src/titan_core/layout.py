"""What a model can do once it is laid out on its ranks, however it is laid out."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from titan_core.routers import Routers

Batch = Mapping[str, Tensor]
"""`tokens` [B, S] int64, and under the names of the model's further arguments: `positions`, `document_ids` and `labels`
[B, S] int64, `row_weights` [B]. All of this rank's rows of a step, on its device."""


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
