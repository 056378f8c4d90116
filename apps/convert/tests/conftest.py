"""What the tests of titan-convert share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import KINDS, save

# As in the command's own processes; transformers must not look for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of model in turn."""
    return request.param


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Saves a model of a kind as transformers does, and returns its folder."""

    def saver(kind: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        save(kind, tmp_path / kind, dtype, **options)
        return tmp_path / kind

    return saver
