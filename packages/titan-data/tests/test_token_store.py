import json

import numpy as np
import pytest

from titan_data import token_store
from titan_data.cache import DamagedError
from titan_data.errors import DataError
from titan_data.reading import Piece
from titan_data.token_store import build_store, open_store

EOS = 7


class Words:
    """A tokenizer of numbers separated by spaces."""

    eos_id = EOS
    bos_id = pad_id = None
    hash = "words"

    def __init__(self, vocab_size=100):
        self.vocab_size = vocab_size
        self.batches = []

    def encode_batch(self, texts):
        self.batches.append(sum(map(len, texts)))
        return [[int(word) for word in text.split()] for text in texts]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def describe(self):
        return "words"


class Pieces:
    fingerprint = "pieces"

    def __init__(self, *pieces):
        self.list = [Piece(*piece) for piece in pieces]
        self.size_bytes = sum(len(piece.text) for piece in self.list)

    def pieces(self, counts):
        for piece in self.list:
            counts.bytes += len(piece.text)
            yield piece

    def describe(self):
        return "2 files"


CORPUS = Pieces(("1 2 3", True), ("", True), ("4", False), ("5 6", False), ("", True), ("  ", True), ("8", True))


def build(folder, corpus=CORPUS, tokenizer=None):
    folder.mkdir(exist_ok=True)
    messages = []
    build_store(folder, corpus, tokenizer or Words(), progress=messages.append)
    return messages


def test_documents_stand_in_a_row_each_with_its_end(tmp_path):
    build(tmp_path)
    store = open_store(tmp_path)
    assert store.tokens.tolist() == [1, 2, 3, EOS, 4, 5, 6, EOS, 8, EOS]
    assert store.document_starts.tolist() == [0, 4, 8, 10]
    assert store.document_starts.dtype == np.int64
    assert (store.meta.documents, store.meta.empty_documents) == (3, 2)


def test_how_text_is_grouped_makes_no_difference(tmp_path, monkeypatch):
    build(tmp_path / "a")
    monkeypatch.setattr(token_store, "_BATCH_CHARS", 2)
    words = Words()
    build(tmp_path / "b", tokenizer=words)
    assert len(words.batches) >= 4
    for name in ("tokens.bin", "documents.bin", "meta.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_text_is_tokenized_a_bounded_amount_at_a_time(tmp_path):
    piece = "1 " * (1 << 14)
    words = Words()
    build(tmp_path, Pieces(*[(piece, False)] * 200, ("", True)), words)
    assert max(words.batches) <= token_store._BATCH_CHARS + len(piece)
    assert len(words.batches) > 1
    assert len(open_store(tmp_path).tokens) == 200 * (1 << 14) + 1


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_tokens_are_as_narrow_as_the_vocabulary_allows(tmp_path, vocab_size, dtype):
    build(tmp_path, Pieces((f"0 {vocab_size - 1}", True)), Words(vocab_size))
    store = open_store(tmp_path)
    assert store.tokens.dtype == dtype
    assert store.tokens.tolist() == [0, vocab_size - 1, EOS]


def test_is_mapped_and_read_only(tmp_path):
    build(tmp_path)
    tokens = open_store(tmp_path).tokens
    assert isinstance(tokens.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 5


@pytest.mark.parametrize("corpus", [Pieces(), Pieces(("", True)), Pieces(("  ", True), ("", True))])
def test_an_empty_corpus_is_refused(tmp_path, corpus):
    with pytest.raises(DataError, match=r"the corpus is empty: 2 files hold 0 tokens.*data\.source"):
        build(tmp_path, corpus)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin"])
@pytest.mark.parametrize("change", ["shorter", "longer", "missing"])
def test_files_of_another_length_are_damaged(tmp_path, name, change):
    build(tmp_path)
    file = tmp_path / name
    content = file.read_bytes()
    if change == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if change == "shorter" else content + b"\0")
    with pytest.raises(DamagedError, match=name):
        open_store(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_meta_file_that_is_not_one_is_damaged(tmp_path, content):
    build(tmp_path)
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(DamagedError, match=r"meta\.json"):
        open_store(tmp_path)


def test_another_format_is_not_read(tmp_path):
    build(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"format": 0}))
    with pytest.raises(DamagedError, match="format 0"):
        open_store(tmp_path)


def test_a_missing_folder_is_not_damaged_but_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_store(tmp_path / "nowhere")


def test_progress_is_told_with_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "_SECONDS_BETWEEN_MESSAGES", -1)
    first, *middle, last = build(tmp_path)
    assert first == "tokenizing 2 files"
    assert middle == ["tokenizing: 100% of the text, 10 tokens"]
    assert "into 10 tokens" in last
