import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ranks import run_ranks
from titan_ckpt import dcp
from titan_ckpt.errors import CheckpointError, DamagedCheckpointError


def tensors() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model": {"w.x": torch.randn(5, 3, generator=generator), "half": torch.arange(4).bfloat16()},
        "step": torch.tensor(3.0),
        "empty": torch.zeros(0, 2),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dcp.write(tmp_path, tensors(), rank=0)
    return tmp_path


def test_the_records_are_those_of_the_files(tmp_path: Path) -> None:
    records = dcp.write(tmp_path, tensors(), rank=0)
    assert set(records) == {path.name for path in tmp_path.iterdir()} == {".metadata", "__0_0.distcp"}
    for name, record in records.items():
        content = (tmp_path / name).read_bytes()
        assert (record.size, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_any_torch_user_can_read_what_is_written(folder: Path) -> None:
    state = {"model": {"w.x": torch.zeros(5, 3)}, "step": torch.tensor(0.0)}
    torch_dcp.load(state, checkpoint_id=folder)
    assert torch.equal(state["model"]["w.x"], tensors()["model"]["w.x"])
    assert state["step"] == 3
    dcp_to_torch_save(folder, folder / "x.pt")
    converted = torch.load(folder / "x.pt", weights_only=True)
    assert torch.equal(converted["model"]["w.x"], tensors()["model"]["w.x"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_any_torch_user_writes_can_be_read(tmp_path: Path) -> None:
    torch_dcp.save({**tensors(), "epoch": 3, "list": [torch.ones(2)]}, checkpoint_id=tmp_path)
    metadata = dcp.read_metadata(tmp_path)
    assert set(dcp.tensor_entries(metadata)) == {"model.w.x", "model.half", "step", "empty", "list.0"}
    target = {"model.half": torch.zeros(4, dtype=torch.bfloat16)}
    dcp.read(tmp_path, target, metadata, rank=0)
    assert target["model.half"].tolist() == [0, 1, 2, 3]


def test_the_same_state_gives_the_same_bytes_wherever_it_is_written(tmp_path: Path) -> None:
    assert dcp.write(tmp_path / "a", tensors(), 0) == dcp.write(tmp_path / "b", tensors(), 0)
    assert str(tmp_path).encode() not in (tmp_path / "a" / ".metadata").read_bytes()


def test_torchs_own_checksums_are_off_only_while_writing(tmp_path: Path) -> None:
    options = [torch.serialization.get_crc32_options()]
    dcp.write(tmp_path, tensors(), 0, on_write=lambda size: options.append(torch.serialization.get_crc32_options()))
    options.append(torch.serialization.get_crc32_options())
    assert (options[0], set(options[1:-1]), options[-1]) == (True, {False}, True)


def test_metadata_that_would_run_code_is_refused(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(folder / "ran"),)

    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"asks for posix\.mkdir"):
        dcp.read_metadata(folder)
    assert not (folder / "ran").exists()


def test_metadata_that_is_cut_or_missing_is_damage(folder: Path) -> None:
    content = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(content[:-30])
    with pytest.raises(DamagedCheckpointError, match="cannot be read"):
        dcp.read_metadata(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(DamagedCheckpointError, match="is missing"):
        dcp.read_metadata(folder)


def test_short_and_absent_files_are_found_without_a_manifest(folder: Path) -> None:
    metadata = dcp.read_metadata(folder)
    assert dcp.missing_bytes(folder, metadata) == []
    os.truncate(folder / "__0_0.distcp", 100)
    (problem,) = dcp.missing_bytes(folder, metadata)
    assert problem.startswith("__0_0.distcp has 100 bytes of at least")
    (folder / "__0_0.distcp").unlink()
    assert dcp.missing_bytes(folder, metadata) == ["__0_0.distcp is missing"]


def test_progress_adds_up_to_the_bytes(folder: Path) -> None:
    metadata = dcp.read_metadata(folder)
    target = {"model.w.x": torch.zeros(5, 3), "step": torch.zeros(())}
    seen: list[int] = []
    dcp.read(folder, target, metadata, rank=0, progress=seen.append)
    assert sum(seen) == 5 * 3 * 4 + 4


def test_a_tensor_goes_from_any_layout_to_any_other(tmp_path: Path) -> None:
    full = torch.arange(7 * 5, dtype=torch.float32).view(7, 5)

    def place(world_size: int, *placements: Any, shape: tuple[int, ...]) -> DTensor:
        return distribute_tensor(full, init_device_mesh("cpu", shape), placements)

    def save() -> list[str]:
        mine = place(4, Shard(0), Shard(1), shape=(2, 2))
        return sorted(dcp.write(tmp_path, {"w": mine, "plain": full}, rank=int(os.environ["RANK"])))

    def load(*placements: Any, shape: tuple[int, ...]) -> bool:
        target = place(3, *placements, shape=shape)
        target.to_local().zero_()
        plain = torch.zeros(7, 5)
        dcp.read(tmp_path, {"w": target, "plain": plain}, dcp.read_metadata(tmp_path), int(os.environ["RANK"]))
        return torch.equal(target.full_tensor(), full) and torch.equal(plain, full)

    files = run_ranks(4, save)
    assert [name for names in files for name in names] == [".metadata", *(f"__{rank}_0.distcp" for rank in range(4))]
    assert run_ranks(3, lambda: load(Shard(0), shape=(3,))) == [True] * 3
    assert run_ranks(2, lambda: load(Replicate(), shape=(2,))) == [True] * 2
    assert run_ranks(4, lambda: load(Replicate(), Shard(1), shape=(2, 2))) == [True] * 4


def test_a_failed_rank_raises_its_own_error_and_the_others_none(tmp_path: Path) -> None:
    (tmp_path / "__1_0.distcp").write_text("in the way")

    def save() -> str:
        rank = int(os.environ["RANK"])
        try:
            dcp.write(tmp_path, {"w": torch.zeros(2), "v": torch.zeros(2)}, rank)
        except FileExistsError:
            return "exists"
        return "fine"

    assert run_ranks(2, save) == ["fine", "exists"]
