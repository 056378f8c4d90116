import math

import torch

from titan_ckpt.conversion.compare import differences
from titan_ckpt.formats.lazy import LazyTensor, in_memory


def lazy(tensors: dict[str, torch.Tensor]) -> dict[str, LazyTensor]:
    return {name: in_memory(tensor, "x") for name, tensor in tensors.items()}


def found(one: torch.Tensor, other: torch.Tensor) -> list[tuple[str, float | None]]:
    return [(each.what, each.largest) for each in differences(lazy({"t": one}), lazy({"t": other}))]


def test_equal_tensors_have_no_difference() -> None:
    odd = torch.tensor([1.0, math.inf, -math.inf, math.nan])
    assert found(odd, odd.clone()) == []
    assert found(torch.tensor(2), torch.tensor(2)) == []
    assert found(torch.empty(0, 3), torch.empty(0, 3)) == []


def test_each_kind_of_difference_is_told() -> None:
    assert found(torch.ones(2), torch.ones(3)) == [("shape", None)]
    assert found(torch.ones(2), torch.ones(2).bfloat16()) == [("dtype", None)]
    assert found(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.5, 2.0])) == [("numbers", 1.0)]
    assert found(torch.tensor([math.inf]), torch.tensor([1.0])) == [("numbers", math.inf)]
    ((what, largest),) = found(torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 9.0]))
    assert what == "numbers"
    assert largest is not None
    assert math.isnan(largest)
    only = [each.what for each in differences(lazy({"a": torch.ones(1)}), lazy({"b": torch.ones(1)}))]
    assert only == ["only in A", "only in B"]


def test_a_large_tensor_is_compared_in_pieces() -> None:
    one = torch.zeros(1 << 14, 1 << 10)
    other = one.clone()
    other[-1, -1] = 0.5
    read: list[int] = []
    (only,) = differences(lazy({"t": one}), lazy({"t": other}), read.append)
    assert (only.largest, only.detail) == (0.5, "1 numbers differ")
    assert len(read) == 2
    assert sum(read) == one.nbytes
