"""Small corpora on disk, and token streams in memory."""

import hashlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import settings

from titan_data.fingerprint import FileHash, LocalContent
from titan_data.source import Piece, ReadCounts
from titan_data.source_file import SourceFile

settings.register_profile("titan-data", deadline=None, database=None, max_examples=60)
settings.load_profile("titan-data")

POEM = (
    "Whose woods these are I think I know.\nHis house is in the village though;\n",
    "He will not see me stopping here\nTo watch his woods fill up with snow.\n",
    "Größe, naïve, 東京, emoji 🙂 and\ttabs\r\nall of it UTF-8.\n",
)


class ArrayStream:
    """A `TokenStream` in memory."""

    def __init__(self, tokens, document_starts, eos_id):
        self.tokens, self.document_starts, self.eos_id = tokens, document_starts, eos_id
        self.token_count = len(tokens)

    def copy_tokens(self, start, out):
        out[:] = self.tokens[start : start + len(out)]


def stream_of(lengths, eos_id=0):
    """Documents of these lengths, eos included; every token of the stream differs from its neighbours."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return ArrayStream(np.arange(1, starts[-1] + 1).astype(np.uint32), starts, eos_id)


@pytest.fixture(scope="session")
def make_stream():
    return stream_of


@pytest.fixture(scope="session")
def make_array_stream():
    return ArrayStream


class Words:
    """A tokenizer of numbers separated by spaces."""

    name = engine = "words"
    eos_id = 7
    bos_id = pad_id = None
    hash = "words"
    files: ClassVar = {"words.txt": b"numbers"}

    def __init__(self, vocab_size=100):
        self.vocab_size = vocab_size
        self.batches = []

    def speed_up(self):
        pass

    def encode_batch(self, texts):
        self.batches.append(sum(map(len, texts)))
        return [np.array([int(word) for word in text.split()], dtype=np.uint32) for text in texts]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def describe(self):
        return "words"


@pytest.fixture(scope="session")
def words():
    return Words


class PiecesPart:
    """Some pieces in memory."""

    def __init__(self, pieces):
        self.list = [Piece(*piece) for piece in pieces]
        self.size_bytes = sum(len(piece.text) for piece in self.list)

    def pieces(self, counts):
        yield from self.list


class PiecesSource:
    """Pieces in memory, in parts of so many."""

    fingerprint = "pieces"

    def __init__(self, *pieces, part=1000):
        self.parts = [PiecesPart(pieces[i : i + part]) for i in range(0, len(pieces), part)]

    def describe(self):
        return "2 files"


@pytest.fixture(scope="session")
def pieces_source():
    return PiecesSource


def file_at(path):
    """A file of a source, as it is now."""
    path = Path(path)
    status = path.stat()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return SourceFile(str(path), LocalContent(path, FileHash(status.st_size, status.st_mtime_ns, digest)))


@pytest.fixture(scope="session")
def source_file():
    return file_at


def documents_of(parts, counts=None):
    """The texts of these parts, put together from their pieces."""
    counts = counts or ReadCounts()
    texts, text = [], ""
    for part in parts:
        for piece in part.pieces(counts):
            text += piece.text
            if piece.ends_document:
                texts.append(text)
                text = ""
    assert not text
    return texts


@pytest.fixture(scope="session")
def documents():
    return documents_of


@pytest.fixture
def corpus_folder(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, text in enumerate(POEM):
        (folder / f"{number}.txt").write_bytes(text.encode() * 5)
    return folder


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory) -> Path:
    """A tokenizer as users have it: a folder with a tokenizer.json."""
    from titan_data.bpe import train_bpe

    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in train_bpe(POEM * 20, 310).items():
        (folder / name).write_bytes(content)
    return folder


CHAT_TOKENS = (
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
    "[INST]",
    "[/INST]",
)


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory) -> Path:
    """A tokenizer with the control tokens of several chat templates."""
    from titan_data.bpe import train_bpe
    from titan_data.chat_bpe import with_control_tokens
    from titan_data.hugging_face_tokenizer import HuggingFaceTokenizer

    trained = HuggingFaceTokenizer(train_bpe(POEM * 20, 400), name="trained")
    folder = tmp_path_factory.mktemp("chat")
    for name, content in with_control_tokens(trained, CHAT_TOKENS).files.items():
        (folder / name).write_bytes(content)
    return folder
