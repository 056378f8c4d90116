import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_data.rows import IGNORED_LABEL, NO_ROW
from titan_data.windows import TokenWindows, count_windows, cut_windows

documents = st.lists(st.integers(1, 12), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) >= 2)


def one_token_at_a_time(stream, window, S, confine):
    """The same row, written down from the definition."""
    N = len(stream.tokens)
    document_of = np.repeat(np.arange(len(stream.document_starts) - 1), np.diff(stream.document_starts))
    row = []
    position = document = 0
    for place in range(S):
        i = window * S + place
        padding = i >= N - 1
        begins = place > 0 and ((not padding and document_of[i] != document_of[i - 1]) or (padding and i == N - 1))
        if place > 0:
            position = 0 if confine and begins else position + 1
            document += bool(confine and begins)
        token, label = (stream.eos_id, IGNORED_LABEL) if padding else (stream.tokens[i], stream.tokens[i + 1])
        row.append((token, label, position, document))
    return np.array(row).T


@given(lengths=documents, S=st.integers(1, 16), confine=st.booleans())
def test_rows_are_as_defined(make_stream, lengths, S, confine):
    stream = make_stream(lengths)
    windows = np.arange(count_windows(len(stream.tokens), S))[::-1].copy()
    batch = cut_windows(stream, windows, seq_len=S, confine_attention=confine)
    for row, window in enumerate(windows):
        got = np.stack([batch[name][row] for name in ("tokens", "labels", "positions", "document_ids")])
        np.testing.assert_array_equal(got, one_token_at_a_time(stream, window, S, confine))


@given(lengths=documents, S=st.integers(1, 16))
def test_every_token_but_the_first_is_predicted_once_from_the_one_before_it(make_stream, lengths, S):
    stream = make_stream(lengths)
    batch = cut_windows(stream, np.arange(count_windows(len(stream.tokens), S)), seq_len=S)
    counted = batch["labels"] != IGNORED_LABEL
    np.testing.assert_array_equal(batch["labels"][counted], stream.tokens[1:])
    np.testing.assert_array_equal(batch["tokens"][counted], stream.tokens[:-1])


def test_an_example_to_read(make_stream):
    stream = make_stream([3, 4], eos_id=99)  # tokens 1 2 3 | 4 5 6 7
    batch = cut_windows(stream, np.array([0, 1, NO_ROW]), seq_len=4)
    assert batch["tokens"].tolist() == [[1, 2, 3, 4], [5, 6, 99, 99], [99, 99, 99, 99]]
    assert batch["labels"].tolist() == [[2, 3, 4, 5], [6, 7, -100, -100], [-100, -100, -100, -100]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0], [0, 1, 0, 1], [0, 1, 2, 3]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]]


def test_rows_are_whole_arrays_of_int64(make_stream):
    batch = cut_windows(make_stream([9]), np.array([0, 1]), seq_len=4)
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}
    assert all(array.flags.c_contiguous and array.shape == (2, 4) for array in batch.values())


@pytest.mark.parametrize(("tokens", "seq_len", "windows"), [(2, 1, 1), (2, 8, 1), (9, 4, 2), (10, 4, 3)])
def test_count(tokens, seq_len, windows):
    assert count_windows(tokens, seq_len) == windows


def test_refuses_what_cannot_be_cut():
    with pytest.raises(ValueError, match="at least 2"):
        count_windows(1, 4)
    with pytest.raises(ValueError, match="at least 1 token"):
        count_windows(100, 0)


def test_windows_are_rows(make_stream):
    stream = make_stream([3, 4, 2, 8], eos_id=99)
    rows = TokenWindows(stream, seq_len=4, confine_attention=False)
    assert len(rows) == 4
    assert (rows.seq_len, rows.tokens_per_row, rows.documents_per_row) == (4, 4, 1)
    chosen = np.array([2, NO_ROW])
    for name, array in cut_windows(stream, chosen, seq_len=4, confine_attention=False).items():
        np.testing.assert_array_equal(rows.read(chosen)[name], array)
