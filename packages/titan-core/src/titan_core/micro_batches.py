"""Forward and backward over micro-batches, or forward alone, for every layout that runs all of a model on each rank."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from titan_core.layout import Batch, OnAction
from titan_core.routers import Routers


class MicroBatchLoop(ABC):
    """Accumulates gradients over micro-batches of at most `size` rows."""

    def __init__(self, model: nn.Module, size: int, routers: Routers) -> None:
        self.model = model
        self.routers = routers
        self._size = size

    @abstractmethod
    def begin_step(self) -> None:
        """Prepares parameters for the micro-batches of one step."""

    @abstractmethod
    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Forward and backward of one micro-batch happen within it; `last` is the step's last."""

    def accumulate(self, batch: Batch, *, divisor: float) -> Tensor:
        """Adds up gradients of the model's summed loss over `batch`, divided by `divisor`.

        Returns that loss, a float64 scalar, of this rank's tokens.
        """
        self.begin_step()
        pieces = list(split_rows(batch, self._size))
        loss = torch.zeros((), device=batch["tokens"].device, dtype=torch.float64)
        for i, (tokens, others) in enumerate(pieces):
            with self.micro_batch(last=i == len(pieces) - 1):
                part = self.model(tokens, **others) / divisor
                part.backward()
            loss += part.detach()
        return loss

    def evaluate(self, batch: Batch) -> Tensor:
        """The model's summed loss over `batch`, a float64 scalar, of this rank's tokens."""
        self.begin_step()
        loss = torch.zeros((), device=batch["tokens"].device, dtype=torch.float64)
        with evaluating(self.model):
            for tokens, others in split_rows(batch, self._size):
                with self.micro_batch(last=True):
                    loss += self.model(tokens, **others)
        self.end_evaluation()
        return loss

    def watch(self, on_action: OnAction) -> None:
        """There is no pipeline, so there is nothing to tell."""
        return

    @abstractmethod
    def end_evaluation(self) -> None:
        """Leaves parameters as they are between steps."""


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients, and no module that behaves as in training."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()


def split_rows(batch: Batch, size: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Cuts a batch into micro-batches of at most `size` rows: tokens, and the model's further arguments."""
    pieces = {name: tensor.split(size) for name, tensor in batch.items()}
    for i, tokens in enumerate(pieces.pop("tokens")):
        yield tokens, {name: pieces[name][i] for name in pieces}
