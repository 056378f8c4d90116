from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_data.permutation import permute

seeds = st.integers(-(2**70), 2**70)


def whole(size, seed=0, epoch=0):
    return permute(np.arange(size), size=size, seed=seed, epoch=epoch)


@given(size=st.integers(1, 3000), seed=seeds, epoch=st.integers(0, 2**40))
def test_is_a_permutation_of_any_size(size, seed, epoch):
    np.testing.assert_array_equal(np.sort(whole(size, seed, epoch)), np.arange(size))


@pytest.mark.parametrize("size", range(1, 70))
def test_is_a_permutation_of_every_small_size(size):
    np.testing.assert_array_equal(np.sort(whole(size, seed=3)), np.arange(size))


@given(size=st.integers(1, 2**62), seed=seeds, data=st.data())
def test_distinct_indices_stay_distinct_and_inside_at_any_size(size, seed, data):
    indices = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=50))
    images = permute(np.array(sorted(indices)), size=size, seed=seed, epoch=1)
    assert len(set(images.tolist())) == len(indices)
    assert images.min() >= 0
    assert images.max() < size


@given(size=st.integers(1, 500), seed=seeds, data=st.data())
def test_an_index_alone_goes_where_it_goes_in_company(size, seed, data):
    index = data.draw(st.integers(0, size - 1))
    assert permute(np.array([index]), size=size, seed=seed, epoch=2)[0] == whole(size, seed, 2)[index]


def test_stays_the_same_for_ever():
    # Written down from the first version: another order would silently change every experiment.
    assert whole(10, seed=42, epoch=0).tolist() == [8, 4, 3, 5, 0, 2, 9, 7, 1, 6]
    huge = permute(np.array([0, 1, 10**15]), size=10**15 + 37, seed=1, epoch=7)
    assert huge.tolist() == [293710928158416, 249163636646964, 244792250211029]


def test_epochs_and_seeds_share_no_more_places_than_chance_gives():
    size = 10_000
    first = whole(size, seed=5, epoch=0)
    for other in (whole(size, seed=5, epoch=1), whole(size, seed=6, epoch=0), whole(size, seed=0, epoch=5)):
        assert np.count_nonzero(first == other) <= 10  # one is expected


def test_displacement_and_order_look_random():
    size = 20_011
    images = whole(size, seed=1)
    displacement = np.abs(images - np.arange(size))
    assert abs(displacement.mean() / size - 1 / 3) < 0.01
    for lag in (1, 2, 3, 141, 142):  # 142 is the side of the network
        steps = Counter(((images[lag:] - images[:-lag]) % size).tolist())
        assert steps.most_common(1)[0][1] <= 12  # a Poisson variable of mean 1 on 20 thousand draws
        assert abs(np.corrcoef(images[lag:], images[:-lag])[0, 1]) < 0.03


@pytest.mark.parametrize("size", [2, 3, 5, 9, 10])
def test_over_many_seeds_every_index_goes_everywhere_equally_often(size):
    draws = 2000
    counts = np.zeros((size, size))
    for seed in range(draws):
        counts[np.arange(size), whole(size, seed)] += 1
    expected = draws / size
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom)


def test_refuses_what_it_cannot_permute():
    with pytest.raises(ValueError, match="size must be at least 1"):
        permute(np.array([0]), size=0, seed=0, epoch=0)
    with pytest.raises(ValueError, match=r"outside range\(3\)"):
        permute(np.array([3]), size=3, seed=0, epoch=0)
    with pytest.raises(ValueError, match=r"outside range\(3\)"):
        permute(np.array([-1]), size=3, seed=0, epoch=0)
