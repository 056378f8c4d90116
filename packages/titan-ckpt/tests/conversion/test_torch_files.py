import collections
import multiprocessing
import os
import pickle
import resource
import signal
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

from titan_ckpt import dcp
from titan_ckpt.checkpoint import open_checkpoint
from titan_ckpt.checkpointer import Checkpointer
from titan_ckpt.conversion.journal import FOLDER
from titan_ckpt.conversion.torch_files import dcp_to_torch, torch_to_dcp
from titan_ckpt.errors import CheckpointError, DamagedCheckpointError
from titan_ckpt.storage import HashingFile


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4).bfloat16())


@pytest.fixture
def checkpoint(tmp_path: Path, box: Any) -> Path:
    state = {"model": model(), "data": box({"epoch": 3, "t": torch.arange(5)})}
    Checkpointer(tmp_path / "run").save(7, state)
    return tmp_path / "run" / "step-7"


@pytest.fixture
def torch_file(tmp_path: Path) -> Path:
    torch.save(model().state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one
    )


def test_a_checkpoint_becomes_one_flat_file(checkpoint: Path, tmp_path: Path) -> None:
    converted = dcp_to_torch(checkpoint, tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt", weights_only=True, mmap=True)
    expected = {f"model.{key}": tensor for key, tensor in model().state_dict().items()}
    assert same(found, {**expected, "data.t": torch.arange(5)})
    assert (converted.tensors, converted.verified, converted.left_out) == (8, True, ("data.epoch",))
    assert converted.size == sum(tensor.nbytes for tensor in found.values())
    archive = zipfile.ZipFile(tmp_path / "all.pt")
    assert all(archive.read(name) for name in archive.namelist() if "/data/" not in name)  # their CRCs are right
    assert {path.name for path in tmp_path.iterdir()} == {"run", "all.pt"}


def test_one_object_is_taken_out_under_its_own_keys(checkpoint: Path, tmp_path: Path) -> None:
    converted = dcp_to_torch(checkpoint, tmp_path / "model.pt", only="model")
    target = model()
    torch.nn.init.zeros_(target[0].weight)
    target.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert same(target.state_dict(), model().state_dict())
    assert converted.left_out == ()
    with pytest.raises(CheckpointError, match=r"no tensors under 'mod'. The names that it has: data, model\."):
        dcp_to_torch(checkpoint, tmp_path / "x.pt", only="mod")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_plain_dcp_folder_is_converted_and_its_pickles_are_left_out(tmp_path: Path) -> None:
    state = {"model": model().state_dict(), "epoch": 3, "sched": {"last": [1, 2]}}
    torch_dcp.save(state, checkpoint_id=tmp_path / "plain")
    converted = dcp_to_torch(tmp_path / "plain", tmp_path / "x.pt", only="model")
    assert same(torch.load(tmp_path / "x.pt", weights_only=True), dict(model().state_dict()))
    assert not converted.verified
    assert dcp_to_torch(tmp_path / "plain", tmp_path / "y.pt").left_out == ("epoch", "sched.last")


def test_a_file_becomes_a_checkpoint_that_loads(torch_file: Path, tmp_path: Path) -> None:
    converted = torch_to_dcp(torch_file, tmp_path / "step-3", under="model")
    assert converted.tensors == 7
    checkpointer = Checkpointer(tmp_path)
    found = checkpointer.newest_whole()
    assert found is not None
    assert found.step == 3
    target = model()
    torch.nn.init.zeros_(target[0].weight)
    checkpointer.load(found, {"model": target})
    assert same(target.state_dict(), model().state_dict())


def test_there_and_back_changes_no_bit(checkpoint: Path, tmp_path: Path) -> None:
    dcp_to_torch(checkpoint, tmp_path / "1.pt")
    torch_to_dcp(tmp_path / "1.pt", tmp_path / "folder")
    dcp_to_torch(tmp_path / "folder", tmp_path / "2.pt")
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("1.pt", "2.pt"))
    assert same(one, two)
    assert open_checkpoint(tmp_path / "folder").manifest.state == ("data", "model")


def test_nested_dicts_are_flattened_and_json_values_kept(tmp_path: Path) -> None:
    tree = {
        "model": collections.OrderedDict(w=torch.nn.Parameter(torch.ones(2))),
        "optim": {"state": {0: {"exp_avg": torch.zeros(3)}}, "lr": 1e-3, "betas": (0.9, 0.95)},
    }
    torch.save(tree, tmp_path / "x.pth")
    torch_to_dcp(tmp_path / "x.pth", tmp_path / "folder")
    entries = dcp.tensor_entries(dcp.read_metadata(tmp_path / "folder"))
    assert set(entries) == {"model.w", "optim.state.0.exp_avg"}
    assert open_checkpoint(tmp_path / "folder").read_values() == {"optim.lr": 1e-3, "optim.betas": [0.9, 0.95]}


def test_the_old_format_of_torch_save_is_read_too(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert torch_to_dcp(tmp_path / "x.pt", tmp_path / "folder").tensors == 1


def refuse(convert: Callable[..., object], src: Path, dst: Path, **options: Any) -> str:
    """The message with which a conversion is refused, leaving everything as it was."""
    root = dst.parent if dst.parent.is_dir() else dst.parent.parent
    before = {path: path.read_bytes() if path.is_file() else b"" for path in root.rglob("*")}
    with pytest.raises(CheckpointError) as raised:
        convert(src, dst, **options)
    assert {path: path.read_bytes() if path.is_file() else b"" for path in root.rglob("*")} == before
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_what_is_not_there_or_of_the_wrong_kind_is_refused(checkpoint: Path, torch_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "absent does not exist" in refuse(dcp_to_torch, tmp_path / "absent", out)
    assert "absent does not exist" in refuse(torch_to_dcp, tmp_path / "absent", out)
    assert "is a file, and a folder in DCP layout is wanted" in refuse(dcp_to_torch, torch_file, out)
    assert "is a folder, and a file that torch.save" in refuse(torch_to_dcp, checkpoint, out)
    assert "name one of them: step-7." in refuse(dcp_to_torch, checkpoint.parent, out)
    assert "has no .metadata file" in refuse(dcp_to_torch, tmp_path, out)


def test_nothing_is_overwritten_unasked(checkpoint: Path, torch_file: Path, tmp_path: Path) -> None:
    assert "exists" in refuse(dcp_to_torch, checkpoint, torch_file)
    assert "exists" in refuse(torch_to_dcp, torch_file, checkpoint)
    assert "is a folder" in refuse(dcp_to_torch, checkpoint, tmp_path, overwrite=True)
    (tmp_path / "photos").mkdir()
    assert "is not a checkpoint" in refuse(torch_to_dcp, torch_file, tmp_path / "photos", overwrite=True)
    for content in (b"", b"my notes", b"PK\5\6" + bytes(18)):  # the last is an archive, an empty one
        (tmp_path / "photos" / "notes").write_bytes(content)
        message = refuse(dcp_to_torch, checkpoint, tmp_path / "photos" / "notes", overwrite=True)
        assert "notes exists and is no file of torch.save" in message

    dcp_to_torch(checkpoint, torch_file, only="data", overwrite=True)
    assert torch.load(torch_file, weights_only=True)["t"].tolist() == [0, 1, 2, 3, 4]
    torch_to_dcp(torch_file, checkpoint, under="data", overwrite=True)
    assert open_checkpoint(checkpoint).manifest.state == ("data",)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "photos", "model.pt"}
    assert {path.name for path in checkpoint.parent.iterdir()} == {"step-7"}


def test_a_damaged_checkpoint_is_refused_naming_the_files(checkpoint: Path, tmp_path: Path) -> None:
    content = (checkpoint / "__0_0.distcp").read_bytes()
    data = torch.arange(5).numpy().tobytes()
    (checkpoint / "__0_0.distcp").write_bytes(content.replace(data, data.replace(b"\3", b"\7")))
    assert "__0_0.distcp has other bytes" in refuse(dcp_to_torch, checkpoint, tmp_path / "x.pt")
    dcp_to_torch(checkpoint, tmp_path / "x.pt", verify_hashes=False)
    assert torch.load(tmp_path / "x.pt", weights_only=True)["data.t"].tolist() == [0, 1, 2, 7, 4]
    os.truncate(checkpoint / "__0_0.distcp", 50)
    assert "has 50 bytes instead of" in refuse(dcp_to_torch, checkpoint, tmp_path / "y.pt", verify_hashes=False)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_damaged_plain_folder_is_refused(tmp_path: Path) -> None:
    torch_dcp.save({"w": torch.ones(100)}, checkpoint_id=tmp_path / "plain")
    data = tmp_path / "plain" / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(b"x" * len(content))
    assert "a tensor cannot be read" in refuse(dcp_to_torch, tmp_path / "plain", tmp_path / "x.pt")
    data.write_bytes(content[:-10])
    assert "bytes of at least" in refuse(dcp_to_torch, tmp_path / "plain", tmp_path / "x.pt")
    data.unlink()
    assert "__0_0.distcp is missing" in refuse(dcp_to_torch, tmp_path / "plain", tmp_path / "x.pt")
    with pytest.raises(DamagedCheckpointError):
        dcp_to_torch(tmp_path / "plain", tmp_path / "x.pt")


def test_a_damaged_or_strange_file_is_refused(torch_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    content = torch_file.read_bytes()
    torch_file.write_bytes(content[:-100])
    assert "cannot be read as a torch.save file" in refuse(torch_to_dcp, torch_file, out)
    torch_file.write_bytes(b"")
    assert "cannot be read as a torch.save file" in refuse(torch_to_dcp, torch_file, out)
    torch.save([torch.ones(1)], torch_file)
    assert "holds a list, and a dict of tensors is wanted" in refuse(torch_to_dcp, torch_file, out)
    torch.save({"a": 1}, torch_file)
    assert "holds no tensors" in refuse(torch_to_dcp, torch_file, out)
    torch.save({"a": torch.ones(1), "b": torch.float32, "c": torch.ones(2, 2).to_sparse()}, torch_file)
    message = refuse(torch_to_dcp, torch_file, out)
    assert "b is of type dtype; c is a tensor of layout torch.sparse_coo" in message
    torch.save({"a": torch.ones(1)}, torch_file)
    assert "cannot be used" in refuse(torch_to_dcp, torch_file, out, under="a.b")


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": model()}, tmp_path / "model.pt")
    assert "would run torch.nn.modules" in refuse(torch_to_dcp, tmp_path / "model.pt", tmp_path / "out")

    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    refuse(torch_to_dcp, tmp_path / "evil.pt", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_a_place_that_cannot_be_written_is_refused(checkpoint: Path, torch_file: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "absent" / "x"
    for message in (refuse(dcp_to_torch, checkpoint, nowhere), refuse(torch_to_dcp, torch_file, nowhere)):
        assert f"absent/x could not be written: the folder {nowhere.parent} does not exist; make it first" in message
    under_a_file = torch_file / "x"
    assert "model.pt is a file" in refuse(dcp_to_torch, checkpoint, under_a_file)
    assert "model.pt is a file" in refuse(torch_to_dcp, torch_file, under_a_file)


def test_what_killed_runs_have_left_of_the_same_file_is_removed(checkpoint: Path, tmp_path: Path) -> None:
    def killed() -> None:
        HashingFile.write = lambda self, data: os.kill(os.getpid(), signal.SIGKILL)
        dcp_to_torch(checkpoint, tmp_path / "x.pt")

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    left = [path.name for path in tmp_path.glob("x.pt.tmp-*")]
    assert len(left) == 1
    others = ("x.pt.tmp-notes", "y.pt.tmp-0a1b2c3d", "x.pt.old-0a1b2c3d")
    for name in others:
        (tmp_path / name).touch()
    dcp_to_torch(checkpoint, tmp_path / "x.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "x.pt", *others}


def test_the_remains_of_another_conversion_can_be_deleted(torch_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial" / FOLDER).mkdir(parents=True)
    (tmp_path / "out.partial" / FOLDER / "plan.json").write_text("{}")
    assert "--restart" in refuse(torch_to_dcp, torch_file, tmp_path / "out")
    torch_to_dcp(torch_file, tmp_path / "out", restart=True)
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt", "out"}


def test_a_full_disk_is_told_and_what_is_whole_is_kept(checkpoint: Path, torch_file: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        assert "could not be written" in refuse(dcp_to_torch, checkpoint, tmp_path / "out")
        with pytest.raises(CheckpointError, match=r"out could not be written: \[Errno 27\] File too large"):
            torch_to_dcp(torch_file, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").is_dir()
    torch_to_dcp(torch_file, tmp_path / "out")
    assert same(read_back(tmp_path / "out"), dict(model().state_dict()))
    assert {path.name for path in tmp_path.iterdir()} == {"run", "model.pt", "out"}


def read_back(folder: Path) -> dict[str, torch.Tensor]:
    """What torch's own reader finds."""
    entries = dcp.tensor_entries(dcp.read_metadata(folder))
    found = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_dcp.load(found, checkpoint_id=folder)
    return found


def test_progress_goes_from_nothing_to_all_in_each_part(checkpoint: Path, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}

    def progress(what: str, done: int, total: int) -> None:
        seen.setdefault(what, []).append((done, total))

    converted = dcp_to_torch(checkpoint, tmp_path / "x.pt", progress=progress)
    assert list(seen) == ["verifying", "writing"]
    torch_to_dcp(tmp_path / "x.pt", tmp_path / "folder", progress=progress)
    for steps in seen.values():
        dones = [done for done, _ in steps]
        assert steps[-1][0] == steps[-1][1]
        assert len(dones) > 1
    assert seen["writing"][-1][1] == converted.size
