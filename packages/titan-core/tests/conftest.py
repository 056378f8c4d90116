"""A model with one module of every role, small enough to train in milliseconds, and nothing from another package."""

import pytest
import torch

# Whatever a rank imports after the fork, each rank would import for itself.
import torch.distributed.fsdp
import torch.distributed.tensor
from torch import nn

import ranks  # noqa: F401  (sets one thread before any operation, so that ranks may be forked)

VOCAB, DIM, LENGTH = 32, 12, 10

TOY_ROLES = {
    "embed": "embedding",
    "layers.*": "block",
    "layers.*.norm": "norm",
    "layers.*.up": "colwise",
    "layers.*.down": "rowwise",
    "norm": "norm",
    "head": "head",
}
TOY_RULES = {
    "*.norm.weight": ("constant", 1.0),
    "layers.*.norm.*": ("constant", 1.0),
    "norm.*": ("constant", 1.0),
    "layers.*.*.bias": ("constant", 0.0),
    "layers.*.*.weight": ("normal", 0.3),
    "*.weight": ("normal", 0.3),
}


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM, bias=False)
        self.up = nn.Linear(DIM, 3 * DIM)
        self.down = nn.Linear(3 * DIM, DIM, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Toy(nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList([ToyBlock(), ToyBlock()])
        self.norm = nn.LayerNorm(DIM, bias=False)
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


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
