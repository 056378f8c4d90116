import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from titan_data.order import Order, ShuffledRows
from titan_data.rows import NO_ROW
from titan_data.windows import TokenWindows


def order(n, **options):
    return Order(**({"row_count": n, "seed": 1} | options))


@given(n=st.integers(1, 60), shuffle=st.booleans())
def test_each_epoch_reads_every_row_once(n, shuffle):
    rows = order(n, shuffle=shuffle).rows(np.arange(3 * n))
    for epoch in range(3):
        np.testing.assert_array_equal(np.sort(rows[epoch * n : (epoch + 1) * n]), np.arange(n))


@given(n=st.integers(1, 60), first=st.integers(0, 10**15), count=st.integers(1, 40), data=st.data())
def test_rows_are_the_same_whoever_asks(n, first, count, data):
    cut = data.draw(st.integers(0, count))
    samples = first + np.arange(count)
    one = order(n)
    np.testing.assert_array_equal(np.concatenate([one.rows(samples[:cut]), one.rows(samples[cut:])]), one.rows(samples))


def test_each_epoch_and_each_seed_has_its_own_order():
    first, second = order(100).rows(np.arange(200)).reshape(2, 100)
    assert np.count_nonzero(first == second) < 10
    assert np.count_nonzero(first == order(100, seed=2).rows(np.arange(100))) < 10


def test_without_shuffling_the_rows_come_in_turn():
    assert order(5, shuffle=False).rows(np.arange(4, 8)).tolist() == [4, 0, 1, 2]


def test_epoch_is_a_position():
    assert order(200).epoch(0) == 0
    assert order(200).epoch(272) == 1.36


def test_shuffled_rows_read_what_the_order_says(make_stream):
    rows = TokenWindows(make_stream([9, 30, 2]), seq_len=8)
    samples = ShuffledRows(rows, seed=1, name="poems")
    assert samples.row_count == 5
    assert samples.epochs(7) == {"poems": 1.4}
    batch = samples.read(np.array([3, NO_ROW, 12]))
    assert batch["sample_ids"].tolist() == [*order(5).rows(np.array([3])), -1, *order(5).rows(np.array([12]))]
    np.testing.assert_array_equal(batch["tokens"], rows.read(batch["sample_ids"])["tokens"])
