"""What the tests of titan-convert share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import KINDS, as_meta, save
from titan_convert.cli import main

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


@pytest.fixture
def places(saved: Callable[..., Path], tmp_path: Path) -> dict[str, Path]:
    """One model in all formats."""
    source = saved("llama-scaled")
    as_meta(source, tmp_path / "meta", 2)
    assert main(["hf-to-dcp", str(source), str(tmp_path / "step-0"), "--no-check"]) == 0
    assert main(["dcp-to-torch", str(tmp_path / "step-0"), str(tmp_path / "x.pt"), "--only", "model"]) == 0
    return {"hf": source, "meta": tmp_path / "meta", "dcp": tmp_path / "step-0", "torch": tmp_path / "x.pt"}
