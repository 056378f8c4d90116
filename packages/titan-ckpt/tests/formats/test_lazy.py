import pytest
import torch

from titan_ckpt.formats.lazy import (
    LazyTensor,
    cast,
    concatenate,
    halves_from_pairs,
    in_memory,
    item,
    narrow,
    pairs_from_halves,
    stack,
)


def lazy(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[LazyTensor, torch.Tensor]:
    tensor = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    return in_memory(tensor, "file"), tensor


def check(found: LazyTensor, expected: torch.Tensor) -> None:
    """In pieces of every size it has the same rows."""
    assert (found.shape, found.dtype) == (tuple(expected.shape), expected.dtype)
    for limit in (1, 3 * expected[:1].nbytes, 1 << 30):
        rows = torch.cat([found.read(*piece) for piece in found.pieces(limit)])
        assert torch.equal(rows, expected)


def test_pieces_have_at_most_so_many_bytes_and_at_least_a_row() -> None:
    tensor, _ = lazy(10, 4)
    assert list(tensor.pieces(40)) == [(row, min(row + 2, 10)) for row in range(0, 10, 2)]
    assert list(tensor.pieces(1)) == [(row, row + 1) for row in range(10)]
    assert list(lazy()[0].pieces()) == [(0, 1)]
    assert list(lazy(0, 3)[0].pieces()) == []


def test_a_cast_keeps_the_numbers() -> None:
    tensor, expected = lazy(5, 3)
    check(cast(tensor, torch.bfloat16), expected.bfloat16())
    assert cast(tensor, torch.float32) is tensor


def test_stacking_and_taking_apart() -> None:
    parts = [lazy(4, 3)[0], cast(lazy(4, 3)[0], torch.float32)]
    whole = stack(parts)
    expected = torch.stack([part.all() for part in parts])
    check(whole, expected)
    check(item(whole, 1), expected[1])


@pytest.mark.parametrize("dim", [0, 1])
def test_cutting_and_putting_together(dim: int) -> None:
    whole, expected = lazy(6, 8)
    parts = [narrow(whole, dim, start, 2) for start in range(0, expected.shape[dim], 2)]
    check(parts[1], expected.narrow(dim, 2, 2))
    check(concatenate(parts, dim), expected)


def test_the_rotary_layouts_are_each_others_inverse() -> None:
    tensor, expected = lazy(12, 5)  # two heads of six
    halves = halves_from_pairs(tensor, 6)
    # Rows 0, 2, 4 of a head turn with 1, 3, 5: first come the first partners, then the second ones.
    order = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    check(halves, expected[order])
    check(pairs_from_halves(halves, 6), expected)
