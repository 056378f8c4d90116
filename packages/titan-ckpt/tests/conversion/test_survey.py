import hashlib
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import save_file

from titan_ckpt.conversion.keymap import ModelFacts
from titan_ckpt.conversion.plan import run
from titan_ckpt.conversion.survey import detect, read_any, survey, verify
from titan_ckpt.conversion.torch_files import torch_to_dcp
from titan_ckpt.conversion.translate import from_hugging_face, to_hugging_face
from titan_ckpt.errors import CheckpointError
from titan_ckpt.location import place_of

STATE = {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    found = {kind: tmp_path / kind for kind in ("checkpoint", "dcp", "hf", "llama")}
    found |= {"torch": tmp_path / "x.pt", "safetensors": tmp_path / "x.safetensors"}
    torch.save(STATE, found["torch"])
    save_file(STATE, found["safetensors"])
    torch_to_dcp(found["torch"], found["checkpoint"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_dcp.save({**STATE, "epoch": 3}, checkpoint_id=found["dcp"])
    for kind in ("hf", "llama"):
        found[kind].mkdir()
    save_file(STATE, found["hf"] / "model.safetensors")
    torch.save(STATE, found["llama"] / "consolidated.00.pth")
    return found


@pytest.mark.parametrize("kind", ["checkpoint", "dcp", "hf", "llama", "torch", "safetensors"])
def test_every_format_is_recognised_counted_and_found_whole(places: dict[str, Path], kind: str) -> None:
    place = place_of(places[kind])
    assert detect(place) == kind
    counted = survey(read_any(place, {}))
    assert (counted.tensors, counted.parameters, counted.nbytes) == (2, 5, 16)
    assert counted.dtypes == {"float32": 12, "bfloat16": 4}
    assert counted.others == (kind == "dcp")
    assert verify(place)[0] == []


def test_what_is_nothing_is_refused_with_what_is_near(places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        detect(place_of(tmp_path / "absent"))
    (tmp_path / "runs" / "step-5").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="It has the folders step-5: name one"):
        detect(place_of(tmp_path / "runs"))


def test_the_manifest_is_looked_at_before_it_is_verified(places: dict[str, Path]) -> None:
    place, manifest = place_of(places["checkpoint"]), places["checkpoint"] / "manifest.json"
    (places["checkpoint"] / "state.json").unlink()
    assert read_any(place, {}).problems == ("state.json is missing",)
    manifest.write_text(manifest.read_text()[:-5])
    assert "manifest.json cannot be read" in read_any(place, {}).problems[0]


def damage(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-4] + bytes(255 - byte for byte in content[-4:]))


def test_a_changed_byte_of_a_checkpoint_is_found(places: dict[str, Path]) -> None:
    damage(places["checkpoint"] / "__0_0.distcp")
    problems, looked_at = verify(place_of(places["checkpoint"]))
    assert problems == ["__0_0.distcp has other bytes than were written (its SHA-256 differs)"]
    assert "by the manifest" in looked_at


def test_without_hashes_it_is_said_that_numbers_may_have_changed(places: dict[str, Path]) -> None:
    file = places["hf"] / "model.safetensors"
    damage(file)
    assert verify(place_of(places["hf"])) == (
        [],
        "headers, index and sizes; no hashes are known, so that changed numbers would not be seen",
    )
    file.write_bytes(file.read_bytes()[:-1])
    assert "is no whole safetensors file" in verify(place_of(places["hf"]))[0][0]


def hub_note(folder: Path, name: str) -> None:
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    note = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{'0' * 40}\n{digest}\n1700000000.0\n")


def test_the_hashes_of_the_hub_of_meta_and_of_a_conversion_are_used(places: dict[str, Path], tmp_path: Path) -> None:
    hub_note(places["hf"], "model.safetensors")
    digest = hashlib.md5((places["llama"] / "consolidated.00.pth").read_bytes()).hexdigest()
    (places["llama"] / "checklist.chk").write_text(f"{digest}  consolidated.00.pth\n")
    facts = ModelFacts(shapes={"a": (3,), "b": (2,)}, head_dim=2)
    keys = {"a": "a", "b": "b"}
    run(to_hugging_face(from_hugging_face(places["hf"], keys, facts), tmp_path / "out", keys=keys, files={}))
    for folder, name, algorithm in (
        (places["hf"], "model.safetensors", "SHA256"),
        (places["llama"], "consolidated.00.pth", "MD5"),
        (tmp_path / "out", "model.safetensors", "SHA256"),
    ):
        assert verify(place_of(folder)) == ([], "headers, index and sizes, and hashes of 1 files")
        damage(folder / name)
        assert f"{name} has other bytes than were written (its {algorithm} differs)" in verify(place_of(folder))[0]
    (tmp_path / "out" / "model.safetensors").unlink()
    save_file(STATE, tmp_path / "out" / "other.safetensors")
    assert "model.safetensors is missing" in verify(place_of(tmp_path / "out"))[0]
