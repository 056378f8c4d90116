import numpy as np
import pytest
import torch

from titan_core.optimizers.codebook import Codebook, dynamic_numbers, linear_numbers

CPU = torch.device("cpu")
# Half the widest gap: among the middles of the last decade's parts, 0.9 / parts; at a linear book's lower end, a step.
BOOKS = {
    "dynamic-8-signed": (dynamic_numbers(8, signed=True), 0.45 / 64),
    "dynamic-8": (dynamic_numbers(8, signed=False), 0.45 / 128),
    "dynamic-4-signed": (dynamic_numbers(4, signed=True), 0.45 / 4),
    "linear-4": (linear_numbers(4), 1 / 16),
}


@pytest.mark.parametrize(("name", "count"), [("dynamic-8-signed", 256), ("dynamic-8", 256), ("dynamic-4-signed", 16)])
def test_dynamic_books_use_every_code_and_reach_from_the_smallest_decade_to_one(name, count):
    numbers, _ = BOOKS[name]
    assert len(numbers) == len(set(numbers)) == count
    assert 0.0 in numbers
    assert max(numbers) == 1.0
    smallest = min(abs(number) for number in numbers if number)
    parts = 1 if "signed" in name else 2
    decades = 7 if "8" in name else 3
    assert smallest == pytest.approx(10.0 ** (1 - decades) * (0.1 + 0.45 / parts))


def test_the_linear_book_has_no_zero():
    assert linear_numbers(2) == [0.25, 0.5, 0.75, 1.0]


def inputs(book):
    x = torch.cat([torch.linspace(-1, 1, 40_001), torch.logspace(-9, 0, 20_001), -torch.logspace(-9, 0, 20_001)])
    return x if "signed" in book else x.abs()


@pytest.mark.parametrize("book", BOOKS)
def test_what_comes_back_is_nearest_up_to_the_bits_that_are_looked_at(book):
    numbers, half_gap = BOOKS[book]
    x = inputs(book)
    found = Codebook(numbers, CPU)
    back = found.decode(found.encode(x))
    errors = (back - x).abs()
    assert errors.max() <= half_gap + 2**-12
    # What is nearest to the rounded number is farther from the number itself by twice what rounding has moved it.
    nearest = np.abs(x.double().numpy()[:, None] - np.array(numbers)).min(1)
    assert (errors.double().numpy() <= nearest + 2.0**-11 * x.abs().double().numpy() + 1e-7).all()


def test_relative_errors_are_small_in_the_upper_decade_and_bounded_in_lower_ones():
    book = Codebook(dynamic_numbers(8, signed=True), CPU)
    for decade, parts in ((0, 64), (-1, 32), (-3, 8)):
        x = torch.logspace(decade - 1, decade, 5001)[1:-1] * torch.tensor([[1.0], [-1.0]])
        relative = ((book.decode(book.encode(x)) - x) / x).abs().max()
        # Across the border to the decade below the gap is 2.7 / parts of its top.
        assert relative <= 4.5 / parts + 2**-12


def test_numbers_of_the_book_come_back_as_they_are():
    for numbers, _ in BOOKS.values():
        book = Codebook(numbers, CPU)
        exact = torch.tensor(numbers)
        assert torch.equal(book.decode(book.encode(exact)), exact)
        assert torch.equal(book.decode(book.encode(exact[None, :, None])), exact[None, :, None])


def test_two_books_share_a_byte():
    low = Codebook(dynamic_numbers(4, signed=True), CPU)
    high = Codebook(linear_numbers(4), CPU, shift=4)
    first, second = torch.linspace(-1, 1, 999), torch.linspace(0, 1, 999)
    both = low.encode(first) | high.encode(second)
    assert torch.equal(low.decode(both), low.decode(low.encode(first)))
    assert torch.equal(high.decode(both), high.decode(high.encode(second)))
    assert high.decode(high.encode(torch.zeros(3))).tolist() == [1 / 16] * 3
