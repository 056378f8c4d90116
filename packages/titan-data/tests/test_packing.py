import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_data.conversation_store import ConversationStore
from titan_data.packing import PackedConversations, best_fit, plan_packs
from titan_data.rows import NO_ROW


def store_of(lengths, learned=None):
    """Conversations of these lengths; all tokens differ, and the second half of each is learned."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(1, starts[-1] + 1, dtype=np.uint32)
    flags = np.concatenate([np.arange(length) >= length // 2 for length in lengths]) if learned is None else learned
    return ConversationStore(ids, np.array(flags, dtype=bool), starts)


def rows_of(store, seq_len, too_long="drop", pack=True):
    return PackedConversations(store, plan_packs(store, seq_len=seq_len, too_long=too_long, pack=pack), seq_len, 0)


lengths = st.lists(st.integers(1, 20), min_size=1, max_size=40)


@given(lengths=lengths, S=st.integers(1, 24), too_long=st.sampled_from(["drop", "truncate"]), pack=st.booleans())
def test_no_token_is_lost_and_none_comes_twice(lengths, S, too_long, pack):
    store = store_of(lengths)
    rows = rows_of(store, S, too_long, pack)
    batch = rows.read(np.arange(len(rows)))
    tokens, labels = [], []
    truncated = dropped = 0
    for length, start in zip(lengths, store.starts.tolist(), strict=False):
        places = min(length - 1, S)
        asked = [i for i in range(start + 1, start + 1 + places) if store.learned[i]]
        if length == 1 or (length - 1 > S and (too_long == "drop" or not asked)):
            dropped += 1
            continue
        truncated += length - 1 > S
        tokens += store.ids[start : start + places].tolist()
        labels += store.ids[asked].tolist()
    assert sorted(batch["tokens"][batch["tokens"] != 0].tolist()) == tokens
    assert sorted(batch["labels"][batch["labels"] != -100].tolist()) == labels
    assert (rows.packs.truncated, rows.packs.dropped) == (truncated, dropped)
    # Each is asked for where the one before it is fed.
    asked = batch["labels"] != -100
    np.testing.assert_array_equal(batch["labels"][asked], batch["tokens"][asked] + 1)


@given(lengths=lengths, S=st.integers(1, 24))
def test_conversations_do_not_see_each_other(lengths, S):
    store = store_of(lengths)
    rows = rows_of(store, S)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    batch = rows.read(np.arange(len(rows)))
    for tokens, positions, ids in zip(batch["tokens"], batch["positions"], batch["document_ids"], strict=True):
        conversation = np.where(tokens == 0, -1, owner[tokens - 1])
        begins = np.diff(conversation, prepend=-2) != 0
        np.testing.assert_array_equal(np.diff(ids, prepend=-1) == 1, begins)
        places = np.arange(S)
        np.testing.assert_array_equal(positions, places - np.maximum.accumulate(np.where(begins, places, 0)))


@given(sizes=st.lists(st.integers(1, 30), max_size=60), spare=st.integers(0, 10))
def test_bins_hold_what_they_can_and_few_are_needed(sizes, spare):
    capacity = max(sizes, default=1) + spare
    bins = best_fit(np.array(sizes, dtype=np.int64), capacity)
    filled = np.bincount(bins, weights=sizes) if sizes else np.array([])
    assert (filled <= capacity).all()
    assert (filled > 0).all()
    assert len(filled) <= 11 / 9 * -(-sum(sizes) // capacity) + 4 or sorted(filled)[1] > capacity / 2
    _, first = np.unique(bins, return_index=True)
    assert (np.diff(first) > 0).all()


def test_best_fit_leaves_the_least_room():
    # 6 and 5 open bins; 4 fits the first best and fills it, 3 then goes to the second.
    assert best_fit(np.array([6, 5, 4, 3]), 10).tolist() == [0, 1, 0, 1]
    # Bins are numbered by what stands first in them, not by what was placed first.
    assert best_fit(np.array([3, 9, 7]), 10).tolist() == [0, 1, 0]


def test_an_example_to_read():
    store = store_of([4, 3, 5], learned=[0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 1, 1])
    rows = rows_of(store, 6)
    assert (len(rows), rows.tokens_per_row, rows.documents_per_row) == (2, 4.5, 1.5)
    # The third conversation has 4 places, the first 3, the second 2: it shares a row with the third.
    batch = rows.read(np.array([1, 0, NO_ROW]))
    assert batch["tokens"].tolist() == [[5, 6, 8, 9, 10, 11], [1, 2, 3, 0, 0, 0], [0] * 6]
    no = -100
    assert batch["labels"].tolist() == [[6, 7, no, no, 11, 12], [no, 3, 4, no, no, no], [no] * 6]
    assert batch["positions"].tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]
    assert batch["document_ids"].tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0] * 6]


@pytest.mark.parametrize("pack", [True, False])
def test_padding_is_a_document_of_its_own(pack):
    rows = rows_of(store_of([3, 3]), 6, pack=pack)
    batch = rows.read(np.array([0, NO_ROW]))
    if pack:
        assert batch["document_ids"][0].tolist() == [0, 0, 1, 1, 2, 2]
        assert batch["positions"][0].tolist() == [0, 1, 0, 1, 0, 1]
    else:
        assert len(rows) == 2
        assert batch["document_ids"][0].tolist() == [0, 0, 1, 1, 1, 1]
    assert batch["labels"][1].tolist() == [-100] * 6
    assert batch["tokens"][1].tolist() == [0] * 6


def test_survives_pickling():
    rows = rows_of(store_of([3, 5, 2]), 6)
    again = pickle.loads(pickle.dumps(rows))
    for name, array in rows.read(np.arange(len(rows))).items():
        np.testing.assert_array_equal(array, again.read(np.arange(len(rows)))[name])
