"""One shard of a token folder: some parts of a source, tokenized into one file by one process.

While a folder is being built, a shard has three files: its tokens, where its documents begin, and last of all a
record. The record says that the shard is whole, so that a build which was killed need not make it again. What a shard
holds depends on its parts and the tokenizer alone.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from titan_data.manifest import FileRecord, ShardRecord, shard_record, write_whole
from titan_data.pieces import PIECE_CHARS, grouped
from titan_data.source import Part, Piece, ReadCounts, Source, read_part
from titan_data.tokenizer import Tokenizer

# Text that is tokenized at a time: 32 pieces keep the cores of a large machine busy, and the library's working memory
# (some 150 bytes a token) at a hundred megabytes.
_BATCH_CHARS = 32 * PIECE_CHARS

Report = Callable[[int, int], None]
"""Is told bytes of text and tokens that have been done since it was last called."""


@dataclass(frozen=True)
class Shard:
    """Consecutive parts of a source, that become one file of tokens."""

    index: int
    parts: tuple[Part, ...]

    @property
    def size_bytes(self) -> int:
        """How much there is to read, about."""
        return sum(part.size_bytes for part in self.parts)

    @property
    def tokens_name(self) -> str:
        """The file of its tokens, which stays."""
        return f"shard-{self.index:05}.tokens.bin"

    @property
    def documents_name(self) -> str:
        """The file of where its documents begin, counted from its first token: int64 [documents]."""
        return f"shard-{self.index:05}.documents.bin"

    @property
    def record_name(self) -> str:
        """The file of its record."""
        return f"shard-{self.index:05}.json"


# What of a shard goes when the folder is finished.
PASSING_FILES = ("shard-*.documents.bin", "shard-*.json")


def plan_shards(source: Source, shard_bytes: int) -> list[Shard]:
    """Returns the shards of a source: consecutive parts with at least `shard_bytes` of text, but for the last."""
    shards: list[Shard] = []
    parts: list[Part] = []
    size = 0
    for part in source.parts:
        parts.append(part)
        size += part.size_bytes
        if size >= shard_bytes:
            shards.append(Shard(len(shards), tuple(parts)))
            parts, size = [], 0
    if parts:
        shards.append(Shard(len(shards), tuple(parts)))
    return shards


def make_shard(shard: Shard, *, folder: Path, dtype: np.dtype, tokenizer: Tokenizer, report: Report) -> ShardRecord:
    """Tokenizes a shard into a folder, in memory that grows only with the number of documents.

    Args:
        shard: what to tokenize.
        folder: where its files go.
        dtype: what tokens are stored as.
        tokenizer: makes the tokens.
        report: is called with the bytes and tokens that were added.

    Raises:
        DataError: if its text is malformed.
    """
    path = folder / shard.tokens_name
    scratch = path.with_name(f"{path.name}.partial")
    counts = ReadCounts()
    with scratch.open("wb") as file:
        writer = _Writer(file, dtype, tokenizer)
        left = shard.size_bytes
        for batch in grouped(
            itertools.chain.from_iterable(read_part(part, counts) for part in shard.parts), _BATCH_CHARS
        ):
            tokens = writer.add(batch)
            # How far a packed or encoded file has been read is known at its end; until then its text stands for it.
            done = min(left, sum(len(piece.text) for piece in batch))
            left -= done
            report(done, tokens)
        report(left, 0)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    write_whole(folder / shard.documents_name, np.array(writer.document_starts, dtype=np.int64).tobytes())
    record = ShardRecord(
        file=FileRecord(name=path.name, size_bytes=writer.tokens * dtype.itemsize, sha256=writer.digest.hexdigest()),
        tokens=writer.tokens,
        documents=len(writer.document_starts),
        empty_documents=writer.empty_documents,
        skipped_files=counts.skipped_files,
    )
    write_whole(folder / shard.record_name, json.dumps(dataclasses.asdict(record)).encode())
    return record


def finished_shard(shard: Shard, folder: Path) -> ShardRecord | None:
    """Returns the record of a shard that an earlier build has finished, if its files are as long as they should be."""
    try:
        record = shard_record(json.loads((folder / shard.record_name).read_bytes()))
        sizes = (folder / record.file.name).stat().st_size, (folder / shard.documents_name).stat().st_size
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record if sizes == (record.file.size_bytes, 8 * record.documents) else None


class _Writer:
    """Appends documents to a shard's tokens."""

    def __init__(self, file: BinaryIO, dtype: np.dtype, tokenizer: Tokenizer) -> None:
        self._file, self._dtype, self._tokenizer = file, dtype, tokenizer
        self._end = np.array([tokenizer.eos_id], dtype=np.uint32)
        self._document_start = 0
        self.document_starts: list[int] = []
        self.digest = hashlib.sha256()
        self.tokens = self.empty_documents = 0

    def add(self, pieces: Sequence[Piece]) -> int:
        """Returns how many tokens there were."""
        before = self.tokens
        stream: list[NDArray[np.uint32]] = []
        encoded = self._tokenizer.encode_batch([piece.text for piece in pieces])
        for piece, ids in zip(pieces, encoded, strict=True):
            stream.append(np.asarray(ids, dtype=np.uint32))
            self.tokens += len(ids)
            if not piece.ends_document:
                continue
            if self.tokens == self._document_start:
                self.empty_documents += 1
                continue
            stream.append(self._end)
            self.document_starts.append(self._document_start)
            self.tokens += 1
            self._document_start = self.tokens
        content = np.concatenate(stream).astype(self._dtype).tobytes()
        self._file.write(content)
        self.digest.update(content)
        return self.tokens - before
