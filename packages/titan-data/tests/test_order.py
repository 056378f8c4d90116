import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from titan_data.order import Order


def order(n, B, **options):
    return Order(**({"window_count": n, "global_batch_size": B, "seed": 1} | options))


def batches(order, count):
    return [order.windows(t, range(order.global_batch_size)) for t in range(count)]


@given(n=st.integers(1, 60), B=st.integers(1, 40), shuffle=st.booleans())
def test_each_epoch_reads_every_window_once(n, B, shuffle):
    samples = np.concatenate(batches(order(n, B, shuffle=shuffle), -(-3 * n // B)))
    for epoch in range(3):
        np.testing.assert_array_equal(np.sort(samples[epoch * n : (epoch + 1) * n]), np.arange(n))


@given(n=st.integers(1, 60), B=st.integers(1, 40), t=st.integers(0, 10**12), data=st.data())
def test_rows_are_the_same_whoever_asks(n, B, t, data):
    cut = data.draw(st.integers(0, B))
    one = order(n, B)
    np.testing.assert_array_equal(
        np.concatenate([one.windows(t, range(cut)), one.windows(t, range(cut, B))]), one.windows(t, range(B))
    )


def test_the_global_batch_size_regroups_one_sequence():
    small, large = order(50, 3), order(50, 12)
    np.testing.assert_array_equal(np.concatenate(batches(small, 20)), np.concatenate(batches(large, 5)))


def test_each_epoch_and_each_seed_has_its_own_order():
    first, second = batches(order(100, 100), 2)
    assert np.count_nonzero(first == second) < 10
    assert np.count_nonzero(first == order(100, 100, seed=2).windows(0, range(100))) < 10


def test_without_shuffling_the_windows_come_in_turn():
    assert order(5, 4, shuffle=False).windows(1, range(4)).tolist() == [4, 0, 1, 2]


def test_epoch_is_a_position():
    assert order(200, 4).epoch(0) == 0
    assert order(200, 4).epoch(68) == 1.36
