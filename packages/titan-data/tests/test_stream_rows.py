import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_data import stream_rows
from titan_data.errors import DataError
from titan_data.stream_rows import Position, StreamRows
from titan_data.streams import SourceStreams

documents = st.lists(st.lists(st.integers(10, 99), max_size=6), min_size=1, max_size=8).filter(any)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(stream_rows, "_GROUP_CHARS", 12)


@pytest.fixture(scope="module")
def rows_of(pieces_source, words):
    def rows_of(documents, S, streams=1, confine=True, cut=None):
        """Documents of numbers; each is cut into two pieces at `cut`."""
        pieces = []
        for document in documents:
            first, rest = (document[:cut], document[cut:]) if cut and len(document) > cut else ([], document)
            pieces += [(" ".join(map(str, first)), False)] if first else []
            pieces += [(" ".join(map(str, rest)), True)]
        return StreamRows(SourceStreams(pieces_source(*pieces), seed=0), words(), streams, S, confine)

    return rows_of


def stream_of(documents, epochs):
    """The tokens of a stream, and the place of each in its document."""
    tokens, places = [], []
    for document in [d for d in documents if d] * epochs:
        tokens += [*document, 7]
        places += range(len(document) + 1)
    return np.array(tokens), np.array(places)


@given(documents=documents, S=st.integers(1, 9), confine=st.booleans(), cut=st.sampled_from([None, 2]))
def test_rows_are_the_endless_stream_cut_up(rows_of, documents, S, confine, cut):
    tokens, places = stream_of(documents, 100)
    count = min(20, (len(tokens) - 1) // S)
    batch = rows_of(documents, S, confine=confine, cut=cut).open(0, Position()).take(count)
    np.testing.assert_array_equal(batch["tokens"].reshape(-1), tokens[: count * S])
    np.testing.assert_array_equal(batch["labels"].reshape(-1), tokens[1 : count * S + 1])
    for row in range(count):
        begins = places[row * S : row * S + S] == 0
        begins[0] = True
        if not confine:
            begins[1:] = False
        np.testing.assert_array_equal(batch["document_ids"][row], np.cumsum(begins) - 1)
        last = np.maximum.accumulate(np.where(begins, np.arange(S), 0))
        np.testing.assert_array_equal(batch["positions"][row], np.arange(S) - last)
    assert all(array.dtype == np.int64 for array in batch.values())


@given(documents=documents, S=st.integers(1, 9), before=st.integers(0, 20), cut=st.sampled_from([None, 2]))
def test_a_position_is_all_it_takes_to_go_on(rows_of, documents, S, before, cut):
    rows = rows_of(documents, S, cut=cut)
    whole = rows.open(0, Position())
    whole.take(before)
    resumed = rows.open(0, whole.position)
    expected, found = whole.take(5), resumed.take(5)
    for name, array in expected.items():
        np.testing.assert_array_equal(array, found[name])
    assert resumed.position == whole.position
    assert resumed.epochs == whole.epochs


def test_positions_count_epochs_and_pieces(rows_of):
    stream = rows_of([[10, 11, 12, 13, 14], [20, 21]], 8).open(0, Position())
    stream.take(1)
    assert stream.position == Position(0, 1, 2)
    stream.take(1)
    assert stream.position == Position(1, 1, 1)


def test_epochs_have_a_fraction_by_what_was_read(rows_of):
    stream = rows_of([[10 + i, 20, 30, 40, 50, 60, 70] for i in range(10)], 8).open(0, Position())
    found = [stream.epochs]
    for _ in range(25):
        stream.take(1)
        found.append(stream.epochs)
    assert found == pytest.approx([row / 10 for row in range(26)], abs=0.01)
    assert found[10] == 1


def test_a_stream_without_documents_is_an_error(rows_of):
    for documents, streams in (([[1]], 2), ([[], []], 1)):
        with pytest.raises(DataError, match=r"stream \d of \d has no documents. Choose fewer streams"):
            rows_of(documents, 4, streams=streams).open(streams - 1, Position()).take(1)
