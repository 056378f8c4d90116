import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_data import token_store
from titan_data.cache import DamagedError
from titan_data.token_store import open_store, verify_store
from titan_data.tokenizing import tokenize_source
from titan_data.windows import count_windows, cut_windows

EOS = 7
DOCUMENTS = [[1, 2, 3, EOS], [4, 5, 6, EOS], [8, EOS]]


@pytest.fixture
def folder(tmp_path, pieces_source, words):
    source = pieces_source(
        ("1 2 3", True), ("", True), ("4", False), ("5 6", False), ("", True), ("  ", True), ("8", True)
    )
    tokenize_source(tmp_path, source, words())
    return tmp_path


@pytest.fixture(scope="session")
def sharded(tmp_path_factory, pieces_source, words):
    """100 documents of 0 to 12 tokens, in shards of two documents each."""
    folder = tmp_path_factory.mktemp("sharded")
    lengths = np.random.default_rng(0).integers(0, 12, size=100)
    texts = [" ".join(str(10 + i % 90) for i in range(length)) for length in lengths]
    sources = pieces_source(*[(text, True) for text in texts], part=1)
    tokenize_source(folder, sources, words(), shard_bytes=20)
    stream = [[*map(int, text.split()), EOS] for text in texts if text]
    return open_store(folder), stream


def test_documents_stand_in_a_row_each_with_its_end(folder):
    store = open_store(folder)
    assert store.read(0, store.token_count).tolist() == [token for document in DOCUMENTS for token in document]
    assert store.document_starts.tolist() == [0, 4, 8, 10]
    assert store.document_starts.dtype == np.int64
    assert (store.manifest.documents, store.manifest.empty_documents) == (3, 2)
    assert [document.tolist() for document in store] == DOCUMENTS
    assert len(store) == 3


def test_shards_are_one_stream(sharded):
    store, documents = sharded
    assert len(store.manifest.shards) > 20
    stream = [token for document in documents for token in document]
    assert store.token_count == len(stream)
    assert [document.tolist() for document in store] == documents
    for start in range(0, len(stream), 7):
        for end in (start, start + 1, min(start + 100, len(stream)), len(stream)):
            assert store.read(start, end).tolist() == stream[start:end]


@given(seq_len=st.integers(1, 300))
def test_windows_span_shards(sharded, make_array_stream, seq_len):
    store, documents = sharded
    whole = make_array_stream(np.concatenate(documents), store.document_starts, EOS)
    windows = np.arange(count_windows(store.token_count, seq_len))
    expected = cut_windows(whole, windows, seq_len=seq_len)
    for name, array in cut_windows(store, windows, seq_len=seq_len).items():
        np.testing.assert_array_equal(array, expected[name])


def test_few_shards_are_mapped_at_a_time(sharded, monkeypatch):
    monkeypatch.setattr(token_store, "_MAPPED_SHARDS", 3)
    store = open_store(sharded[0].folder)
    assert store.read(0, store.token_count).tolist() == sharded[0].read(0, store.token_count).tolist()
    assert store._mapped.cache_info().currsize == 3


def test_is_mapped_and_read_only(folder):
    store = open_store(folder)
    for array in (store.shard(0), store.document_starts):
        assert isinstance(array.base, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 5


def test_what_is_not_there_is_an_error(folder):
    store = open_store(folder)
    for start, end in ((-1, 2), (3, 2), (5, 11)):
        with pytest.raises(IndexError, match="of 10"):
            store.read(start, end)
    for document in (-1, 3):
        with pytest.raises(IndexError, match="of 3"):
            store[document]


def test_can_be_sent_to_another_process(sharded):
    store, documents = sharded
    assert pickle.loads(pickle.dumps(store))[5].tolist() == documents[5]


FILES = ["shard-00000.tokens.bin", "documents.bin", "tokenizer/words.txt"]


def test_verifying_finds_nothing_wrong_with_what_was_written(folder, sharded):
    assert verify_store(folder).token_count == 10
    assert verify_store(sharded[0].folder).token_count == sharded[0].token_count


@pytest.mark.parametrize("name", FILES)
def test_verifying_finds_a_changed_byte(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[0] ^= 1
    (folder / name).write_bytes(content)
    open_store(folder)
    with pytest.raises(DamagedError, match=rf"{name}: its bytes are not those that were written"):
        verify_store(folder)


@pytest.mark.parametrize(
    ("tokens", "starts", "message"),
    [
        ([1, 2, 3, EOS, 4, 5, 200, EOS, 8, EOS], [0, 4, 8, 10], "token 200 is not in the vocabulary"),
        ([1, 2, 3, EOS, 4, 5, 6, 6, 8, EOS], [0, 4, 8, 10], "a document does not end with the end-of-text token"),
        ([1, 2, 3, EOS, 4, 5, 6, EOS, 8, EOS], [0, 8, 4, 10], "the documents do not follow each other"),
        ([1, 2, 3, EOS, 4, 5, 6, EOS, 8, EOS], [1, 4, 8, 10], "the documents do not follow each other"),
    ],
)
def test_verifying_reads_what_the_files_mean(folder, monkeypatch, tokens, starts, message):
    monkeypatch.setattr(token_store, "_verify_hash", lambda folder, file: None)
    (folder / FILES[0]).write_bytes(np.array(tokens, dtype=np.uint16).tobytes())
    (folder / FILES[1]).write_bytes(np.array(starts, dtype=np.int64).tobytes())
    with pytest.raises(DamagedError, match=message):
        verify_store(folder)
