from pathlib import Path

import pytest
import torch

from titan_ckpt.errors import CheckpointError, DamagedCheckpointError
from titan_ckpt.formats.lazy import in_memory
from titan_ckpt.formats.meta import read_meta, shards
from titan_ckpt.local_place import LocalPlace

WHOLE = {"rows": torch.arange(32.0).view(8, 4), "columns": torch.arange(24.0).view(3, 8), "norm": torch.ones(5)}
SPLIT = {"rows": 0, "columns": 1, "norm": None}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_cut_by_hand_and_by_us_and_put_together(tmp_path: Path, count: int) -> None:
    files = shards({name: in_memory(tensor, "x") for name, tensor in WHOLE.items()}, SPLIT, count)
    for rank, (file, group) in enumerate(files.items()):
        expected = {"rows": WHOLE["rows"].chunk(count)[rank], "columns": WHOLE["columns"].chunk(count, 1)[rank]}
        expected["norm"] = WHOLE["norm"]
        assert all(torch.equal(group[name].all(), tensor) for name, tensor in expected.items())
        torch.save({name: tensor.clone() for name, tensor in expected.items()}, tmp_path / file)
    found = read_meta(LocalPlace(tmp_path), SPLIT)
    assert list(found.files) == [f"consolidated.0{rank}.pth" for rank in range(count)]
    assert found.problems == ()
    for name, tensor in WHOLE.items():
        assert torch.equal(found.tensors[name].all(), tensor)
        assert torch.equal(found.tensors[name].read(1, 3), tensor[1:3])


def test_shards_that_do_not_divide_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"3 shards don't divide rows \[8, 4\], columns \[3, 8\]"):
        shards({name: in_memory(tensor, "x") for name, tensor in WHOLE.items()}, SPLIT, 3)


def test_what_is_missing_or_differs_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no consolidated\.NN\.pth"):
        read_meta(LocalPlace(tmp_path), SPLIT)
    torch.save({"rows": torch.ones(2, 2), "norm": torch.ones(5)}, tmp_path / "consolidated.00.pth")
    torch.save({"norm": torch.zeros(5)}, tmp_path / "consolidated.02.pth")
    found = read_meta(LocalPlace(tmp_path), SPLIT)
    assert "consolidated.01.pth is missing, and consolidated.02.pth is there" in found.problems
    assert "rows is not in consolidated.02.pth" in found.problems
    with pytest.raises(DamagedCheckpointError, match=r"norm should be the same in consolidated\.00\.pth, "):
        found.tensors["norm"].all()


def test_shards_of_different_splits_are_told(tmp_path: Path) -> None:
    for rank, count in enumerate((2, 4)):
        torch.save({"rows": WHOLE["rows"].chunk(count)[rank].clone()}, tmp_path / f"consolidated.0{rank}.pth")
    assert read_meta(LocalPlace(tmp_path), {}).problems == (
        "rows is [2, 4] in consolidated.01.pth and [4, 4] in consolidated.00.pth: they are of different splits",
    )
