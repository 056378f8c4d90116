import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from titan_ckpt.errors import CheckpointError
from titan_ckpt.formats.hugging_face import INDEX_NAME, read_hugging_face, shards
from titan_ckpt.formats.lazy import in_memory
from titan_ckpt.local_place import LocalPlace

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / ONE)
    save_file({"c": torch.ones(4)}, tmp_path / TWO)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": ONE, "b": ONE, "c": TWO}}))
    return tmp_path


def problems(folder: Path) -> str:
    return "; ".join(read_hugging_face(LocalPlace(folder)).problems)


def test_shards_are_one_collection(folder: Path) -> None:
    found = read_hugging_face(LocalPlace(folder))
    assert {name: tensor.files for name, tensor in found.tensors.items()} == {"a": (ONE,), "b": (ONE,), "c": (TWO,)}
    assert found.problems == ()
    assert found.nbytes == 36
    assert set(found.files) == {ONE, TWO}


def test_a_missing_or_cut_shard_is_told(folder: Path) -> None:
    (folder / TWO).write_bytes((folder / TWO).read_bytes()[:-1])
    assert f"{TWO} is no whole safetensors file" in problems(folder)
    (folder / TWO).unlink()
    assert f"{TWO} is missing, which {INDEX_NAME} names" in problems(folder)


def test_shards_that_are_left_over_are_told(folder: Path) -> None:
    save_file({"old": torch.ones(1)}, folder / "model-00003-of-00003.safetensors")
    assert "model-00003-of-00003.safetensors is left over" in problems(folder)
    (folder / INDEX_NAME).unlink()
    save_file({"all": torch.ones(1)}, folder / "model.safetensors")
    assert f"{ONE} is left over: a lone model.safetensors does not go with it" in problems(folder)


def test_a_lone_shard_is_not_taken_for_all(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()
    (folder / TWO).unlink()
    assert problems(folder) == f"{INDEX_NAME} is missing, without which nobody can tell what goes with {ONE}"


def test_an_index_that_disagrees_with_the_files_is_told(folder: Path) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": ONE, "c": TWO, "d": TWO}}))
    assert f"b is in {ONE}, but not in {INDEX_NAME}" in problems(folder)
    assert f"d is not in {TWO}, where {INDEX_NAME} has it" in problems(folder)
    for content in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": []}}'):
        (folder / INDEX_NAME).write_text(content)
        assert f"{INDEX_NAME} cannot be read" in problems(folder)


def test_a_tensor_that_is_there_twice_is_told(folder: Path) -> None:
    save_file({"a": torch.ones(2), "c": torch.ones(4)}, folder / TWO)
    assert f"a is in {TWO} and in {ONE}" in problems(folder)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no safetensors files"):
        read_hugging_face(LocalPlace(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="are pickled"):
        read_hugging_face(LocalPlace(tmp_path))


def test_tensors_are_distributed_by_size() -> None:
    tensors = {name: in_memory(torch.ones(size), "x") for name, size in {"a": 10, "b": 10, "big": 100, "c": 1}.items()}
    files, index = shards(tensors, 80)
    assert [list(group) for group in files.values()] == [["a", "b"], ["big"], ["c"]]
    assert list(files)[2] == "model-00003-of-00003.safetensors"
    body = json.loads(index[INDEX_NAME])
    assert body["metadata"] == {"total_size": 484}
    assert body["weight_map"]["big"] == "model-00002-of-00003.safetensors"
    assert shards(tensors, 1000) == ({"model.safetensors": tensors}, {})
    with pytest.raises(CheckpointError, match=r"cannot hold torch\.complex64"):
        shards({"z": in_memory(torch.ones(1, dtype=torch.complex64), "x")}, 10)
