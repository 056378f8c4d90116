import zipfile
from pathlib import Path

import torch

from titan_ckpt.formats.lazy import in_memory
from titan_ckpt.formats.streams import create
from titan_ckpt.formats.torch_file import is_torch_file, read_torch_file, write_torch_file
from titan_ckpt.local_place import LocalPlace


def test_tensors_of_every_form_are_read_as_they_are(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    tree = {
        "plain": base.view(4, 6),
        "transposed": base.view(4, 6).T,
        "part": base[5:11],
        "row": base.view(4, 6)[2],
        "scalar": torch.tensor(3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "inside": {"deep": torch.ones(2, dtype=torch.uint16)},
        "step": 7,
    }
    torch.save(tree, tmp_path / "x.pt")
    found, values = read_torch_file(LocalPlace(tmp_path), "x.pt")
    expected = {name: tensor for name, tensor in tree.items() if isinstance(tensor, torch.Tensor)}
    expected["inside.deep"] = torch.ones(2, dtype=torch.uint16)
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found.tensors[name].all(), tensor), name
    assert torch.equal(found.tensors["transposed"].read(2, 5), base.view(4, 6).T[2:5])
    assert (values, found.others) == ({"step": 7}, ("step",))


def test_what_is_written_is_what_torch_would_read(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(12.0).view(3, 4).T,
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "uint16": torch.ones(3, dtype=torch.uint16),
        "scalar": torch.tensor(True),
        "empty": torch.empty(0, 3),
    }
    with create(LocalPlace(tmp_path), "x.pt") as file:
        write_torch_file(file, {name: in_memory(tensor, "x") for name, tensor in tensors.items()}, {"again": "a"})
    for mapped in (False, True):
        found = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mapped)
        assert found.keys() == {*tensors, "again"}
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        assert found["again"].data_ptr() == found["a"].data_ptr()
    assert file.record.size == (tmp_path / "x.pt").stat().st_size


def test_what_torch_save_has_written_is_recognised_without_reading_it(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    for new in (True, False):
        torch.save({"w": torch.ones(2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
        assert is_torch_file(place, "x.pt")
    with zipfile.ZipFile(tmp_path / "letters.docx", "w") as archive:
        archive.writestr("word/document.xml", "dear")
    for content in (b"", b"P", b"notes", (tmp_path / "x.pt").read_bytes()[5:]):
        (tmp_path / "notes").write_bytes(content)
        assert not is_torch_file(place, "notes")
    assert not is_torch_file(place, "letters.docx")
