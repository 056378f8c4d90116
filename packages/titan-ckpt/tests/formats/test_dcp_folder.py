import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ranks import run_ranks
from titan_ckpt import dcp
from titan_ckpt.errors import DamagedCheckpointError
from titan_ckpt.formats import dcp_folder
from titan_ckpt.formats.dcp_folder import files_of_parts, metadata_bytes, read_dcp, write_parts
from titan_ckpt.formats.lazy import LazyTensor, in_memory
from titan_ckpt.formats.streams import create
from titan_ckpt.local_place import LocalPlace

TENSORS = {
    "model.a": torch.arange(60.0).view(10, 6),
    "model.scalar": torch.tensor(3),
    "model.empty": torch.empty(0, 3),
    "model.b": torch.arange(8).bfloat16(),
}


def quietly(function, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **options)


def write(folder: Path, tensors: dict[str, LazyTensor], shared: dict[str, str], under: str | None) -> int:
    parts = files_of_parts(tensors)
    places = {}
    for name in parts:
        with create(LocalPlace(folder), name) as file:
            places[name] = write_parts(file, tensors, parts[name])
    (folder / ".metadata").write_bytes(metadata_bytes(tensors, shared, parts, places, under))
    return len(parts)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two rows and files of some, as a large model would have."""
    original = LazyTensor.pieces
    monkeypatch.setattr(LazyTensor, "pieces", lambda self, limit=48: original(self, limit))
    monkeypatch.setattr(dcp_folder, "FILE_BYTES", 100)


@pytest.mark.usefixtures("small_pieces")
def test_torch_reads_what_is_written_in_many_chunks_and_files(tmp_path: Path) -> None:
    lazy = {name: in_memory(tensor, "x") for name, tensor in TENSORS.items()}
    assert write(tmp_path, lazy, {"model.again": "model.a"}, "model") >= 3
    metadata = dcp.read_metadata(tmp_path)
    assert len(dcp.tensor_entries(metadata)["model.a"].chunks) == 5
    assert dcp.missing_bytes(tmp_path, metadata) == []
    expected = {**TENSORS, "model.again": TENSORS["model.a"]}
    found = {name: torch.full_like(tensor, 9) for name, tensor in expected.items()}
    quietly(torch_dcp.load, found, checkpoint_id=tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    nested = {"model": {name.removeprefix("model."): torch.full_like(tensor, 9) for name, tensor in expected.items()}}
    quietly(torch_dcp.load, nested, checkpoint_id=tmp_path)
    assert torch.equal(nested["model"]["a"], TENSORS["model.a"])
    quietly(dcp_to_torch_save, tmp_path, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt")["model"].keys() == {name.removeprefix("model.") for name in expected}
    again = read_dcp(LocalPlace(tmp_path))
    assert again.problems == ()
    assert all(torch.equal(again.tensors[name].all(), tensor) for name, tensor in expected.items())


def test_what_torch_writes_is_read_with_rows_in_any_place(tmp_path: Path) -> None:
    state = {**TENSORS, "transposed": torch.arange(12.0).view(3, 4).T, "epoch": 3}
    quietly(torch_dcp.save, state, checkpoint_id=tmp_path)
    found = read_dcp(LocalPlace(tmp_path))
    assert found.others == ("epoch",)
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor.all(), state[name])
        assert tensor.all().data_ptr() % tensor.dtype.itemsize == 0
    assert torch.equal(found.tensors["model.a"].read(3, 7), TENSORS["model.a"][3:7])


def _save_sharded(folder: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(63.0).view(9, 7)
    state = {f"cut{dim}": distribute_tensor(whole, mesh, [Shard(dim)]) for dim in (0, 1)}
    torch_dcp.save(state, checkpoint_id=folder)


def test_shards_of_rows_and_of_columns_are_put_together(tmp_path: Path) -> None:
    run_ranks(2, _save_sharded, str(tmp_path))
    found = read_dcp(LocalPlace(tmp_path))
    whole = torch.arange(63.0).view(9, 7)
    for tensor in found.tensors.values():
        for start in range(9):
            for stop in range(start + 1, 10):
                assert torch.equal(tensor.read(start, stop), whole[start:stop])
        assert len(tensor.files) == 2


def test_a_huge_chunk_is_not_read_as_a_whole(tmp_path: Path) -> None:
    quietly(torch_dcp.save, {"huge": torch.ones(1 << 14, 1 << 11)}, checkpoint_id=tmp_path)  # 128 MiB in one archive
    found = read_dcp(LocalPlace(tmp_path)).tensors["huge"]
    assert found.read(0, 1).sum() == 1 << 11
    before = _anonymous_bytes()
    total = sum(float(found.read(*piece).sum()) for piece in found.pieces())
    assert total == 1 << 25
    assert _anonymous_bytes() - before < 70 << 20  # a piece, and what torch makes of it


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_damage_is_told_with_the_file(tmp_path: Path) -> None:
    quietly(torch_dcp.save, {"a": torch.ones(100), "b": torch.ones(3)}, checkpoint_id=tmp_path)
    data = tmp_path / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(b"x" * len(content))
    collection = read_dcp(LocalPlace(tmp_path))
    assert collection.problems == ()
    with pytest.raises(DamagedCheckpointError, match=r"__0_0\.distcp: a tensor cannot be read, a"):
        collection.tensors["a"].all()
    data.write_bytes(content[:-10])
    assert "bytes of at least" in read_dcp(LocalPlace(tmp_path)).problems[0]
    data.unlink()
    assert read_dcp(LocalPlace(tmp_path)).problems == ("__0_0.distcp is missing",)
    (tmp_path / ".metadata").write_bytes(b"no")
    with pytest.raises(DamagedCheckpointError, match="metadata cannot be read"):
        read_dcp(LocalPlace(tmp_path))
