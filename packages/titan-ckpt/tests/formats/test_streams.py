import hashlib
from pathlib import Path

import pytest
import torch

from titan_ckpt.formats.lazy import in_memory
from titan_ckpt.formats.streams import byte_view, create, file_hash, write_rows
from titan_ckpt.local_place import LocalPlace
from titan_ckpt.location import place_of


def test_rows_are_written_in_order_dense_and_hashed(anywhere: str) -> None:
    place = place_of(anywhere)
    tensor = torch.arange(24.0).view(4, 6)
    with create(place, "deep/x") as file:
        write_rows(file, in_memory(tensor.T, "x"))
        write_rows(file, in_memory(torch.tensor(2.5), "x"))
    expected = tensor.T.contiguous().numpy().tobytes() + torch.tensor(2.5).numpy().tobytes()
    assert place.read("deep/x") == expected
    assert file.record.sha256 == hashlib.sha256(expected).hexdigest() == file_hash(place, "deep/x")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_bytes_of_any_dtype(dtype: torch.dtype) -> None:
    tensor = torch.ones(3).to(dtype)
    assert bytes(byte_view(tensor)) == bytes(tensor.view(torch.uint8).tolist())
    assert bytes(byte_view(tensor[:0])) == b""


def test_what_a_killed_run_has_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"half a file that is longer")
    with create(LocalPlace(tmp_path), "x") as file:
        file.write(b"whole")
    assert (tmp_path / "x").read_bytes() == b"whole"
