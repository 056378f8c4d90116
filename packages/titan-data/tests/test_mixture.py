import itertools
import pickle
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_data.errors import DataError
from titan_data.mixture import Mixture
from titan_data.rows import NO_ROW
from titan_data.windows import TokenWindows


class Numbers:
    """Rows that are full of their own number and of their dataset's."""

    def __init__(self, count, kind=0, seq_len=4, tokens_per_row=4.0, documents_per_row=1.0):
        self.count, self.kind, self.seq_len = count, kind, seq_len
        self.tokens_per_row, self.documents_per_row = tokens_per_row, documents_per_row

    def __len__(self):
        return self.count

    def read(self, rows):
        tokens = np.repeat(rows[:, None], self.seq_len, axis=1)
        labels = np.where(tokens == NO_ROW, -100, tokens)
        return {"tokens": tokens, "labels": labels, "positions": tokens * 0, "document_ids": tokens * 0 + self.kind}


def mixture_of(sizes, weights, **options):
    names = "abcdefgh"[: len(sizes)]
    sources = {name: Numbers(size, kind) for kind, (name, size) in enumerate(zip(names, sizes, strict=True))}
    changes = {start: dict(zip(names, w, strict=True)) for start, w in options.pop("changes", {}).items()}
    return Mixture(sources, dict(zip(names, weights, strict=True)), **({"seed": 1, "changes": changes} | options))


sources = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=5)


@given(sources=sources, block=st.integers(45, 120), blocks=st.integers(1, 4), far=st.integers(0, 10**9))
def test_every_block_has_exactly_its_share_of_each_source(sources, block, blocks, far):
    sizes, weights = zip(*sources, strict=True)
    mixture = mixture_of(sizes, weights, block_size=block)
    found, _ = mixture.place(far * block + np.arange(blocks * block))
    exact = np.array(weights) / sum(weights) * block
    for part in found.reshape(blocks, block):
        counts = np.bincount(part, minlength=len(sizes))
        assert counts.sum() == block
        assert (np.abs(counts - exact) < 1).all()
        whole = np.isclose(exact, np.round(exact))
        np.testing.assert_array_equal(counts[whole], np.round(exact[whole]))


@given(
    sources=sources,
    other=st.permutations(range(1, 6)),
    block=st.integers(45, 70),
    changes=st.lists(st.integers(1, 400), max_size=3, unique=True),
)
def test_each_source_is_read_in_turn_without_a_gap_across_changes_of_weights(sources, other, block, changes):
    sizes, weights = zip(*sources, strict=True)
    other = other[: len(sizes)]
    mixture = mixture_of(sizes, weights, block_size=block, changes=dict.fromkeys(changes, other))
    found, places = mixture.place(np.arange(500))
    for source in range(len(sizes)):
        mine = places[found == source]
        np.testing.assert_array_equal(mine, np.arange(len(mine)))
        assert mixture.epochs(500)["abcdefgh"[source]] == len(mine) / sizes[source]


@given(sources=sources, start=st.integers(0, 10**14), cut=st.integers(0, 100))
def test_samples_are_the_same_whoever_asks(sources, start, cut):
    sizes, weights = zip(*sources, strict=True)
    mixture = mixture_of(sizes, weights, block_size=50, changes={73: weights[::-1]})
    samples = start + np.arange(100)
    whole = mixture.read(samples)
    first, second = mixture.read(samples[:cut]), mixture.read(samples[cut:])
    for name, array in whole.items():
        np.testing.assert_array_equal(array, np.concatenate([first[name], second[name]]))


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), shuffle=st.booleans())
def test_each_row_comes_once_in_each_epoch_of_its_source(sizes, shuffle):
    mixture = mixture_of(sizes, [1] * len(sizes), block_size=20, shuffle=shuffle)
    batch = mixture.read(np.arange(2 * max(sizes) * 2 * len(sizes) + 20))
    for source, size in enumerate(sizes):
        rows = batch["tokens"][batch["document_ids"][:, 0] == source][:, 0]
        for epoch in range(2):
            np.testing.assert_array_equal(np.sort(rows[epoch * size : (epoch + 1) * size]), np.arange(size))


def test_the_ids_name_source_and_row():
    mixture = mixture_of([5, 7], [1, 1], block_size=4)
    batch = mixture.read(np.array([0, NO_ROW, 1, 2, 3]))
    assert batch["sample_ids"][1] == NO_ROW
    assert (batch["labels"][1] == -100).all()
    assert mixture.row_count == 12
    rows = batch["tokens"][:, 0] + np.where(batch["document_ids"][:, 0] == 1, 5, 0)
    np.testing.assert_array_equal(np.delete(batch["sample_ids"], 1), np.delete(rows, 1))
    names = mixture.source_of(batch["sample_ids"])
    assert names[1] is None
    assert sorted(names[:1] + names[2:]) == ["a", "a", "b", "b"]
    assert mixture.source_of(np.array([4, 5, 11])) == ["a", "b", "b"]


def test_sources_of_one_size_do_not_walk_in_step_and_a_seed_changes_all():
    def rows(seed, kind):
        batch = mixture_of([100, 100], [1, 1], seed=seed).read(np.arange(200))
        return batch["tokens"][batch["document_ids"][:, 0] == kind][:50, 0].tolist()

    orders = [rows(seed, kind) for seed in (1, 2) for kind in (0, 1)]
    for one, other in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(one, other, strict=False)) < 10


def test_a_source_without_weight_changes_nothing_for_the_others():
    alone = mixture_of([10, 20], [3, 1]).place(np.arange(3000))
    beside = mixture_of([10, 20, 30], [3, 1, 0]).place(np.arange(3000))
    for one, other in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(one, other)


def test_weights_of_tokens_and_of_documents_become_shares_of_rows():
    # Rows of a are half full; rows of b hold four documents.
    sources = {"a": Numbers(9, tokens_per_row=2.0), "b": Numbers(9, documents_per_row=4.0)}

    def counts(by):
        mixture = Mixture(sources, {"a": 1, "b": 1}, seed=0, block_size=30, weigh_by=by)
        return np.bincount(mixture.place(np.arange(30))[0]).tolist()

    assert counts("tokens") == [20, 10]
    assert counts("documents") == [24, 6]


def test_weights_change_at_the_sample_that_says_so():
    mixture = mixture_of([10, 10], [1, 0], block_size=8, changes={20: [0, 1], 30: [1, 1]})
    sources, _ = mixture.place(np.arange(46))
    assert sources[:20].tolist() == [0] * 20
    assert sources[20:30].tolist() == [1] * 10
    assert np.bincount(sources[30:46]).tolist() == [8, 8]
    assert "from sample 20: a 0.0%, b 100.0%" in mixture.describe()


def test_floats_are_shares_as_they_are_written():
    mixture = mixture_of([5, 5, 5], [0.29, 0.7, 0.01], block_size=100)
    assert np.bincount(mixture.place(np.arange(100))[0]).tolist() == [29, 70, 1]


def test_survives_pickling(make_stream):
    rows = TokenWindows(make_stream([9, 30, 2]), seq_len=8)
    mixture = Mixture({"a": rows, "b": rows}, {"a": 1, "b": 2}, seed=0, block_size=6)
    expected = mixture.read(np.arange(20))
    again = pickle.loads(pickle.dumps(mixture)).read(np.arange(20))
    for name, array in expected.items():
        np.testing.assert_array_equal(array, again[name])


def test_a_place_far_away_costs_what_the_first_does():
    mixture = mixture_of([4_000_000, 5_000_000, 1_000_000], [5, 4, 1], changes={5_000_000: [1, 1, 1]})

    def seconds(batch):
        best = float("inf")
        for _ in range(20):
            mixture._layout.cache_clear()
            began = time.perf_counter()
            mixture.read(batch * 8 + np.arange(8))
            best = min(best, time.perf_counter() - began)
        return best

    seconds(1)
    assert seconds(1_000_000) <= 1.5 * seconds(1)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({"a": 1}, {}, "weights are given for a; the sources are a, b"),
        ({"a": 1, "b": -1}, {}, "are no shares"),
        ({"a": 0, "b": 0}, {}, "are no shares"),
        ({"a": 1, "b": float("nan")}, {}, "are no shares"),
        ({"a": 1, "b": 1e-6}, {}, r"the weight 1e-06 of b is less than one sample in a block of 1000"),
        ({"a": 1, "b": 1}, {"block_size": 0}, "block_size is 0"),
        ({"a": 1, "b": 1}, {"changes": {0: {"a": 1, "b": 2}}}, "weights cannot change at sample 0"),
        ({"a": 1, "b": 1}, {"changes": {5: {"a": 1}}}, "weights are given for a;"),
    ],
)
def test_refuses_weights_that_mean_nothing(weights, options, message):
    with pytest.raises(DataError, match=message):
        Mixture({"a": Numbers(5), "b": Numbers(5)}, weights, seed=0, **options)


def test_refuses_sources_that_do_not_fit_together():
    with pytest.raises(DataError, match=r"rows of different lengths: \[4, 8\]"):
        Mixture({"a": Numbers(5), "b": Numbers(5, seq_len=8)}, {"a": 1, "b": 1}, seed=0)
    with pytest.raises(DataError, match="at least one source"):
        Mixture({}, {}, seed=0)
