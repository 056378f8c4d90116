import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from titan_ckpt.errors import DamagedCheckpointError
from titan_ckpt.formats.lazy import in_memory
from titan_ckpt.formats.safetensors import DTYPES, read_safetensors, safetensors_size, write_safetensors
from titan_ckpt.formats.streams import create
from titan_ckpt.local_place import LocalPlace

TENSORS = {
    "a": torch.arange(12.0).view(3, 4),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 5),
    "b": torch.arange(6).bfloat16().view(2, 3).T,
}


def test_what_is_written_is_read_by_the_safetensors_package(tmp_path: Path) -> None:
    lazy = {name: in_memory(tensor, "x") for name, tensor in TENSORS.items()}
    with create(LocalPlace(tmp_path), "x.safetensors") as file:
        write_safetensors(file, lazy)
    assert (tmp_path / "x.safetensors").stat().st_size == safetensors_size(lazy) == file.record.size
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_what_the_safetensors_package_writes_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(2).to(dtype) if dtype.itemsize > 1 else torch.zeros(3, dtype=dtype)
    save_file({"odd": torch.zeros(3, dtype=torch.uint8), "t": tensor}, tmp_path / "x.safetensors", {"who": "me"})
    found = read_safetensors(LocalPlace(tmp_path), "x.safetensors")
    assert found["t"].dtype == dtype
    assert torch.equal(found["t"].all().view(torch.uint8), tensor.view(torch.uint8))


def raw(header: object, size: int = 8) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 1 << 60),
        struct.pack("<Q", 50) + b"{}",
        raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})[:-1],
        raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 9),
        raw({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
        raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}, 9),
        raw({"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}),
        raw({"a": {"dtype": "F32"}}),
        raw([]),
    ],
)
def test_what_is_no_such_file_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"x\.safetensors is no whole safetensors file"):
        read_safetensors(LocalPlace(tmp_path), "x.safetensors")
