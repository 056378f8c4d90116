"""A model with one module of every role, small enough to train in milliseconds, and nothing from another package."""

import pytest
import torch

# Whatever a rank imports after the fork, each rank would import for itself.
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor
from torch import nn

import ranks  # noqa: F401  (sets one thread before any operation, so that ranks may be forked)

VOCAB, DIM, LENGTH = 32, 12, 10

TOY_ROLES = {
    "embed": "embedding",
    "layers.*": "block",
    "layers.*.norm": "norm",
    "layers.*.mix": "region",
    "layers.*.mix.up": "colwise",
    "layers.*.mix.down": "rowwise",
    "norm": "norm",
    "head": "head",
}
TOY_RULES = {
    "layers.*.norm.*": ("constant", 1.0),
    "norm.*": ("constant", 1.0),
    "layers.*.*.*.bias": ("normal", 0.1),
    "layers.*.*.*.weight": ("normal", 0.3),
    "*.weight": ("normal", 0.3),
}


class ToyMix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, 3 * DIM)
        self.down = nn.Linear(3 * DIM, DIM)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(hidden)))


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM, bias=False)
        self.mix = ToyMix()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix(self.norm(x))


class ToyHead(nn.Linear):
    chunk_tokens = None

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        logits = hidden @ self.weight.T
        if labels is None:
            return logits
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return nn.functional.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="sum")


class Toy(nn.Module):
    """Four blocks, each of which mixes the width, never the sequence; parts of it may be missing."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleDict({str(i): ToyBlock() for i in range(4)})
        self.norm = nn.LayerNorm(DIM, bias=False)
        self.head = ToyHead(DIM, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        x = x if self.embed is None else self.embed(x)
        for layer in self.layers.values():
            x = layer(x)
        x = x if self.norm is None else self.norm(x)
        return x if self.head is None else self.head(x, labels)


@pytest.fixture
def toy():
    """Builds the toy model on the meta device."""

    def build(dtype: torch.dtype = torch.float32, *, tied: bool = False) -> Toy:
        with torch.device("meta"):
            return Toy(tied=tied).to(dtype)

    return build


@pytest.fixture
def toy_roles():
    return TOY_ROLES


@pytest.fixture
def toy_rules():
    return TOY_RULES
