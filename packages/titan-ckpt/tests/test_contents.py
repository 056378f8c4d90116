import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ranks import run_ranks
from titan_ckpt import dcp
from titan_ckpt.contents import agree, take, write_contents
from titan_ckpt.manifest import Manifest
from titan_ckpt.world import RanksFailedError, World


def write(folder: Path, state: Any, per_rank: Any = None, meta: Any = None, files: Any = None) -> None:
    world = World()
    taken = take(world.rank, 3, state, per_rank or {}, meta=meta or {}, files=files or {}, permanent=False)
    write_contents(world, folder, agree(world, taken))


def test_everything_is_in_the_folder_and_in_the_manifest(tmp_path: Path, box: Any) -> None:
    state = {"a": box({"t": torch.ones(2), "v": {"x": 1}}), "nothing": box({})}
    write(tmp_path, state, {"rng": box({"seed": 5})}, {"tokens": 9}, {"x.json": b"{}", "deep/er/y": b"y"})
    manifest = Manifest.read(tmp_path)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {*manifest.files, "manifest.json"}
    assert found == {".metadata", "__0_0.distcp", "state.json", "files/x.json", "files/deep/er/y", "manifest.json"}
    assert manifest.damage(tmp_path, hashes=True) == []
    assert json.loads((tmp_path / "state.json").read_text()) == {"a.v.x": 1, "rng.rank-0.seed": 5}
    assert (manifest.state, manifest.per_rank, manifest.step) == (("a", "nothing"), ("rng",), 3)
    assert (manifest.world_size, manifest.meta) == (1, {"tokens": 9})
    assert manifest.versions["torch"] == torch.__version__


def test_ranks_may_have_different_keys_and_each_its_own(tmp_path: Path, box: Any) -> None:
    def save() -> None:
        rank = World().rank
        state = {
            "all": box({"x": float("nan"), "t": torch.ones(1)}),
            f"stage{rank}": box({"t": torch.full((2,), rank)}),
        }
        write(tmp_path, state, {"rng": box({"seed": rank, "t": torch.full((1,), rank)})})

    run_ranks(2, save)
    manifest = Manifest.read(tmp_path)
    assert manifest.state == ("all", "stage0", "stage1")
    assert manifest.world_size == 2
    assert manifest.damage(tmp_path, hashes=True) == []
    assert json.loads((tmp_path / "state.json").read_text()).keys() == {"all.x", "rng.rank-0.seed", "rng.rank-1.seed"}
    entries = dcp.tensor_entries(dcp.read_metadata(tmp_path))
    assert set(entries) == {"all.t", "stage0.t", "stage1.t", "rng.rank-0.t", "rng.rank-1.t"}


def test_a_value_that_differs_between_ranks_is_refused(tmp_path: Path, box: Any) -> None:
    def save() -> str:
        with pytest.raises(RanksFailedError) as raised:
            write(tmp_path, {"a": box({"same": 1, "seed": World().rank})})
        return str(raised.value)

    one, two = run_ranks(2, save)
    assert one == two
    assert "differ between ranks: a.seed. Save" in one


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../x", "", ".", "a//b"])
def test_a_file_cannot_leave_its_folder(tmp_path: Path, box: Any, name: str) -> None:
    with pytest.raises(ValueError, match="no name for a file"):
        write(tmp_path, {"a": box({"t": torch.ones(1)})}, files={name: b""})


def test_meta_that_is_not_json_is_refused(tmp_path: Path, box: Any) -> None:
    with pytest.raises(ValueError, match="meta holds something"):
        write(tmp_path, {"a": box({})}, meta={"x": {1: 2}})


def test_files_that_rank_0_does_not_see_are_an_error(tmp_path: Path, box: Any) -> None:
    def save() -> str:
        folder = tmp_path / f"disk-of-rank-{World().rank}"
        folder.mkdir()
        with pytest.raises(RanksFailedError) as raised:
            write(folder, {"a": box({"t": torch.ones(3), "u": torch.ones(3)})})
        assert not (folder / "manifest.json").exists()
        return str(raised.value)

    messages = run_ranks(2, save)
    assert "__1_0.distcp is missing" in messages[0]
    assert "file system that all ranks share" in messages[1]
