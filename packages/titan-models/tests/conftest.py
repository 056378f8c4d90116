"""A model small enough to build in milliseconds."""

import dataclasses

import pytest
import torch

from titan_models.families.llama3 import Llama3Config

torch.set_num_threads(1)


@pytest.fixture
def tiny() -> Llama3Config:
    return Llama3Config(vocab_size=131, dim=48, layers=2, heads=6, kv_heads=2, head_dim=8, hidden_dim=80)


@pytest.fixture
def filled():
    """Builds a model whose weights are random and of a size that lets every part matter."""

    def build(config, seed: int = 0, **changes):
        model = dataclasses.replace(config, **changes).build()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.1 * noise)
        return model

    return build
