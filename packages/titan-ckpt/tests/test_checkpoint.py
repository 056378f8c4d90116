import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ranks import run_ranks
from titan_ckpt.checkpoint import open_checkpoint
from titan_ckpt.checkpointer import Checkpointer
from titan_ckpt.errors import CheckpointError, DamagedCheckpointError


@pytest.fixture
def folder(tmp_path: Path, box: Any) -> Path:
    state = {"a": box({"t": torch.arange(1000), "v": 1})}
    Checkpointer(tmp_path).save(5, state, meta={"tokens": 7}, files={"tokenizer.json": b"{}", "b/c": b"c"})
    return tmp_path / "step-5"


def flip(path: Path) -> None:
    """Changes one byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_tells_what_was_saved(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.step, checkpoint.meta, checkpoint.path) == (5, {"tokens": 7}, folder)
    assert sorted(checkpoint.files) == ["b/c", "tokenizer.json"]
    assert checkpoint.read_file("tokenizer.json") == b"{}"
    assert checkpoint.read_values() == {"a.v": 1}


def test_an_unknown_file_is_refused_naming_those_there_are(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no file 'x'; it has b/c, tokenizer\.json"):
        open_checkpoint(folder).read_file("x")


def test_a_file_that_changed_since_it_was_verified_is_not_handed_out(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    flip(folder / "files" / "tokenizer.json")
    with pytest.raises(DamagedCheckpointError, match=r"files/tokenizer\.json has other bytes"):
        checkpoint.read_file("tokenizer.json")
    (folder / "files" / "tokenizer.json").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"files/tokenizer\.json cannot be read"):
        checkpoint.read_file("tokenizer.json")


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json", "files/b/c", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damage_to_any_file_is_found_and_named(folder: Path, name: str, damage: str) -> None:
    path = folder / name
    match damage:
        case "truncated":
            os.truncate(path, path.stat().st_size - 1)
        case "flipped":
            flip(path)
        case "missing":
            path.unlink()
    with pytest.raises(DamagedCheckpointError) as raised:
        open_checkpoint(folder)
    assert len(raised.value.problems) == 1
    assert raised.value.problems[0].startswith(name)


def test_without_hashes_only_sizes_are_compared(folder: Path) -> None:
    flip(folder / "__0_0.distcp")
    assert open_checkpoint(folder, verify_hashes=False).step == 5
    os.truncate(folder / "__0_0.distcp", 10)
    with pytest.raises(DamagedCheckpointError, match="has 10 bytes instead of"):
        open_checkpoint(folder, verify_hashes=False)


def test_a_checkpoint_under_another_steps_name_is_not_taken_for_it(folder: Path) -> None:
    renamed = folder.rename(folder.with_name("step-6"))
    with pytest.raises(DamagedCheckpointError, match="has the name of step 6, its manifest is of step 5"):
        open_checkpoint(renamed)
    assert open_checkpoint(renamed.rename(renamed.with_name("best"))).step == 5


def test_a_later_format_is_refused_rather_than_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titan_ckpt.manifest.FORMAT_VERSION", 0)
    with pytest.raises(CheckpointError, match=r"could not be opened.*Upgrade titan-ckpt"):
        Checkpointer(folder.parent).newest_whole()


def test_ranks_share_the_verification_and_agree(folder: Path) -> None:
    for name in ("__0_0.distcp", "state.json", "files/b/c"):
        flip(folder / name)

    def check() -> tuple[str, ...]:
        with pytest.raises(DamagedCheckpointError) as raised:
            open_checkpoint(folder)
        return raised.value.problems

    one, two = run_ranks(2, check)
    assert one == two
    assert sorted(problem.split()[0] for problem in one) == ["__0_0.distcp", "files/b/c", "state.json"]
