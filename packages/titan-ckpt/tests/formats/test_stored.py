import io
from pathlib import Path

import pytest
import torch

from titan_ckpt.errors import CheckpointError
from titan_ckpt.formats.stored import StoredFile
from titan_ckpt.location import place_of


@pytest.fixture(params=["local", "remote"])
def file(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> StoredFile:
    """Twelve numbers behind three bytes of something else."""
    place = place_of(tmp_path if request.param == "local" else memory)
    with place.create("x.bin") as out:
        out.write(b"abc" + torch.arange(12, dtype=torch.int32).numpy().tobytes())
    return StoredFile(place, "x.bin")


def test_rows_are_read_wherever_they_begin(file: StoredFile) -> None:
    tensor = file.tensor(torch.int32, (4, 3), 3)
    assert tensor.files == ("x.bin",)
    assert torch.equal(tensor.all(), torch.arange(12, dtype=torch.int32).view(4, 3))
    rows = tensor.read(1, 3)
    assert rows.tolist() == [[3, 4, 5], [6, 7, 8]]
    assert rows.data_ptr() % 4 == 0
    assert file.tensor(torch.int32, (), 7).all() == 1
    assert file.tensor(torch.int32, (0, 3), 3).all().shape == (0, 3)


def test_what_is_changed_in_memory_is_not_changed_in_the_file(file: StoredFile) -> None:
    file.tensor(torch.uint8, (3,), 0).all().fill_(0)
    assert file.place.read("x.bin", 0, 3) == b"abc"


def test_a_part_is_a_file_of_its_own(file: StoredFile) -> None:
    part = io.BufferedReader(file.open(1, 4))
    assert part.read() == b"bc\0\0"
    part.seek(-3, io.SEEK_END)
    assert (part.tell(), part.read(1)) == (1, b"c")
    with pytest.raises(OSError, match="nothing before its beginning"):
        file.open().seek(-1)


def test_bytes_that_are_not_there_are_an_error(file: StoredFile) -> None:
    with pytest.raises(OSError, match="51 bytes, and 52 are needed"):
        file.read(50, 2)
    with pytest.raises(CheckpointError, match=r"x\.bin could not be read: x\.bin has 51 bytes"):
        file.tensor(torch.int32, (13,), 3).all()
