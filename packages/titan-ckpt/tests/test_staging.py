import torch

from titan_ckpt import dcp
from titan_ckpt.staging import HostBuffers


def tensors(value: float, rows: int = 3) -> dict[str, torch.Tensor]:
    return {"a": torch.full((rows, 2), value), "b": torch.full((4, 2), value).t(), "c": torch.tensor(value)}


def test_a_copy_does_not_follow_its_original() -> None:
    originals = tensors(1.0)
    copied = HostBuffers().copy(dcp.share_of(originals))
    for tensor in originals.values():
        tensor.fill_(2.0)
    assert all(tensor.eq(1).all() for tensor in copied.data.values())
    assert {index.fqn: tensor.shape for index, tensor in copied.data.items()} == {
        name: tensor.shape for name, tensor in originals.items()
    }


def test_memory_is_used_again_where_it_fits() -> None:
    buffers = HostBuffers()
    first = buffers.copy(dcp.share_of(tensors(1.0)))
    addresses = {index.fqn: tensor.data_ptr() for index, tensor in first.data.items()}
    second = buffers.copy(dcp.share_of(tensors(2.0, rows=5)))
    again = {index.fqn: tensor.data_ptr() for index, tensor in second.data.items()}
    assert all(tensor.eq(2).all() for tensor in second.data.values())
    assert (addresses["b"], addresses["c"]) == (again["b"], again["c"])
    assert second.data[next(i for i in second.data if i.fqn == "a")].shape == (5, 2)


def test_memory_that_nothing_needs_any_more_is_given_back() -> None:
    buffers = HostBuffers()
    buffers.copy(dcp.share_of(tensors(1.0)))
    buffers.copy(dcp.share_of({"a": torch.zeros(3, 2)}))
    assert [index.fqn for index in buffers._buffers] == ["a"]
