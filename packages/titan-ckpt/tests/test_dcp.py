import hashlib
import os
import pickle
from collections.abc import Callable
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
from titan_ckpt.world import RanksFailedError, World


def tensors() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model": {"w.x": torch.randn(5, 3, generator=generator), "half": torch.arange(4).bfloat16()},
        "step": torch.tensor(3.0),
        "empty": torch.zeros(0, 2),
    }


def write(folder: Path, tensors: dict[str, Any], on_write: Callable[[int], object] = lambda size: None) -> Any:
    world = World()
    return dcp.write(folder, dcp.share_of(tensors, is_first=world.rank == 0), world, on_write)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, tensors())
    return tmp_path


def test_the_records_are_those_of_the_files(tmp_path: Path) -> None:
    records = write(tmp_path, tensors())
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
    dcp.read(tmp_path, target, metadata)
    assert target["model.half"].tolist() == [0, 1, 2, 3]


def test_the_same_state_gives_the_same_bytes_wherever_it_is_written(tmp_path: Path) -> None:
    assert write(tmp_path / "a", tensors()) == write(tmp_path / "b", tensors())
    assert str(tmp_path).encode() not in (tmp_path / "a" / ".metadata").read_bytes()


def test_torchs_own_checksums_are_off_only_while_writing(tmp_path: Path) -> None:
    options = [torch.serialization.get_crc32_options()]
    write(tmp_path, tensors(), lambda size: options.append(torch.serialization.get_crc32_options()))
    options.append(torch.serialization.get_crc32_options())
    assert (options[0], set(options[1:-1]), options[-1]) == (True, {False}, True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_large_share_becomes_two_files_of_equal_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp, "_SECOND_FILE_ABOVE", 1_000)
    many = {f"w{number}": torch.full((100 * number,), float(number)) for number in range(1, 9)}
    write(tmp_path, many)
    sizes = [(tmp_path / f"__0_{number}.distcp").stat().st_size for number in (0, 1)]
    assert abs(sizes[0] - sizes[1]) < 0.1 * sum(sizes)
    state = {name: torch.zeros_like(tensor) for name, tensor in many.items()}
    torch_dcp.load(state, checkpoint_id=tmp_path)
    assert all(torch.equal(state[name], tensor) for name, tensor in many.items())


def test_an_error_in_either_file_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp, "_SECOND_FILE_ABOVE", 1)
    (tmp_path / "__0_1.distcp").write_text("in the way")
    with pytest.raises(RanksFailedError, match=r"File exists.*__0_1\.distcp"):
        write(tmp_path, {"a": torch.ones(10), "b": torch.ones(10)})


def test_what_all_ranks_have_is_divided_among_them(tmp_path: Path) -> None:
    def save() -> None:
        write(tmp_path, {f"w{number}": torch.ones(1000) for number in range(4)})

    run_ranks(2, save)
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("*.distcp")}
    assert sizes.keys() == {"__0_0.distcp", "__1_0.distcp"}
    assert len(set(sizes.values())) == 1


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
    dcp.read(folder, target, metadata, progress=seen.append)
    assert sum(seen) == 5 * 3 * 4 + 4


def test_a_tensor_goes_from_any_layout_to_any_other(tmp_path: Path) -> None:
    full = torch.arange(7 * 5, dtype=torch.float32).view(7, 5)

    def place(world_size: int, *placements: Any, shape: tuple[int, ...]) -> DTensor:
        return distribute_tensor(full, init_device_mesh("cpu", shape), placements)

    def save() -> list[str]:
        mine = place(4, Shard(0), Shard(1), shape=(2, 2))
        return sorted(write(tmp_path, {"w": mine, "plain": full}))

    def load(*placements: Any, shape: tuple[int, ...]) -> bool:
        target = place(3, *placements, shape=shape)
        target.to_local().zero_()
        plain = torch.zeros(7, 5)
        dcp.read(tmp_path, {"w": target, "plain": plain}, dcp.read_metadata(tmp_path))
        return torch.equal(target.full_tensor(), full) and torch.equal(plain, full)

    assert run_ranks(4, save) == [[".metadata", *(f"__{rank}_0.distcp" for rank in range(4))], [], [], []]
    assert run_ranks(3, lambda: load(Shard(0), shape=(3,))) == [True] * 3
    assert run_ranks(2, lambda: load(Replicate(), shape=(2,))) == [True] * 2
    assert run_ranks(4, lambda: load(Replicate(), Shard(1), shape=(2, 2))) == [True] * 4


def test_a_failed_rank_is_an_error_on_all(tmp_path: Path) -> None:
    (tmp_path / "__1_0.distcp").write_text("in the way")

    def save() -> str:
        with pytest.raises(RanksFailedError) as raised:
            write(tmp_path, {"w": torch.zeros(2), "v": torch.zeros(2)})
        return str(raised.value)

    one, two = run_ranks(2, save)
    assert one == two
    assert one.startswith("rank 1: [Errno 17] File exists")
