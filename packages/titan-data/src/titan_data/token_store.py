"""A tokenized corpus on disk: its tokens in one file, where its documents begin in another, mapped into memory.

    tokens.bin      N token ids in a row, uint16 if the vocabulary allows it, else uint32
    documents.bin   int64 [D + 1]: the first token of each document, then N
    meta.json       counts and types, and how long the files must be

All little-endian, as is every machine that torch runs on. Each document ends with the end-of-text token; one
that has no tokens is left out.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from titan_data.cache import DamagedError, Progress
from titan_data.errors import DataError
from titan_data.reading import PIECE_CHARS, Piece, ReadCounts
from titan_data.sources import Corpus
from titan_data.tokenizer import Tokenizer, library_threads

_FORMAT = 1
_TOKENS, _DOCUMENTS, _META = "tokens.bin", "documents.bin", "meta.json"

# Text that is tokenized at a time: 32 pieces keep the cores of a large machine busy, and the library's working memory
# (some 150 bytes a token) at a hundred megabytes.
_BATCH_CHARS = 32 * PIECE_CHARS
_SECONDS_BETWEEN_MESSAGES = 2.0


@dataclass(frozen=True, kw_only=True)
class StoreMeta:
    """What `meta.json` says of its neighbours."""

    format: int
    token_type: str
    tokens: int
    documents: int
    empty_documents: int
    skipped_files: int


@dataclass(frozen=True)
class TokenStore:
    """A tokenized corpus, mapped into memory.

    `tokens` is uint16 or uint32 [N]; `document_starts` is int64 [D + 1] and ends with N.
    """

    folder: Path
    meta: StoreMeta
    tokens: NDArray[np.unsignedinteger]
    document_starts: NDArray[np.int64]


def open_store(folder: Path) -> TokenStore:
    """Maps a tokenized corpus.

    Raises:
        FileNotFoundError: if the folder is not there.
        DamagedError: if a file in it is missing, or not as long as it was written.
    """
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        meta = StoreMeta(**json.loads((folder / _META).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise DamagedError(f"{_META}: {error}") from error
    if meta.format != _FORMAT:
        raise DamagedError(f"format {meta.format} instead of {_FORMAT}")
    return TokenStore(
        folder,
        meta,
        _map(folder / _TOKENS, np.dtype(meta.token_type), meta.tokens),
        _map(folder / _DOCUMENTS, np.dtype(np.int64), meta.documents + 1),
    )


def _map(path: Path, dtype: np.dtype, count: int) -> NDArray:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DamagedError(f"{path.name}: {error.strerror}") from error
    if size != count * dtype.itemsize:
        raise DamagedError(f"{path.name} has {size:,} bytes instead of {count * dtype.itemsize:,}")
    # As a plain array: slicing a numpy.memmap costs a microsecond more each time.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(count,)))


def build_store(folder: Path, corpus: Corpus, tokenizer: Tokenizer, *, progress: Progress) -> None:
    """Tokenizes a corpus into an empty folder, in memory that does not grow with it.

    Raises:
        DataError: if the corpus is malformed, or too small to predict anything from.
    """
    began = time.monotonic()
    counts = ReadCounts()
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    progress(f"tokenizing {corpus.describe()}")
    with (folder / _TOKENS).open("wb") as tokens, (folder / _DOCUMENTS).open("wb") as documents:
        writer = _Writer(tokens, documents, dtype, tokenizer.eos_id)
        reported = began
        with library_threads():
            for batch in _batches(corpus.pieces(counts)):
                encoded = tokenizer.encode_batch([piece.text for piece in batch])
                for piece, ids in zip(batch, encoded, strict=True):
                    writer.add(ids, ends_document=piece.ends_document)
                if time.monotonic() - reported > _SECONDS_BETWEEN_MESSAGES:
                    reported = time.monotonic()
                    share = counts.bytes / max(1, corpus.size_bytes)
                    progress(f"tokenizing: {share:.0%} of the text, {writer.tokens:,} tokens")
        for file in (tokens, documents):
            file.flush()
            os.fsync(file.fileno())
    if writer.tokens < 2:
        raise DataError(
            f"the corpus is empty: {corpus.describe()} hold {writer.tokens} tokens, and training takes at least 2. "
            "Check what data.source names."
        )
    meta = StoreMeta(
        format=_FORMAT,
        token_type=dtype.name,
        tokens=writer.tokens,
        documents=writer.documents,
        empty_documents=writer.empty_documents,
        skipped_files=counts.skipped_files,
    )
    (folder / _META).write_text(json.dumps(asdict(meta), indent=2))
    seconds = time.monotonic() - began
    progress(f"tokenized {counts.bytes / 1e6:,.1f} MB into {meta.tokens:,} tokens in {seconds:.1f} s")


class _Writer:
    """Appends documents, token by token, to the two files."""

    def __init__(self, tokens: BinaryIO, documents: BinaryIO, dtype: np.dtype, eos_id: int) -> None:
        self._tokens_file, self._documents_file = tokens, documents
        self._dtype = dtype
        self._eos_id = eos_id
        self._document_start = 0
        self.tokens = self.documents = self.empty_documents = 0
        self._note_start()

    def add(self, ids: list[int], *, ends_document: bool) -> None:
        self._append(ids)
        if not ends_document:
            return
        if self.tokens == self._document_start:
            self.empty_documents += 1
            return
        self._append([self._eos_id])
        self._document_start = self.tokens
        self.documents += 1
        self._note_start()

    def _append(self, ids: list[int]) -> None:
        self._tokens_file.write(np.array(ids, dtype=self._dtype).tobytes())
        self.tokens += len(ids)

    def _note_start(self) -> None:
        self._documents_file.write(np.int64(self._document_start).tobytes())


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
