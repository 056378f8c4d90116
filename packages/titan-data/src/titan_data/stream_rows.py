"""Rows of virtual streams, tokenized as they are needed.

    group       pieces of a stream that are tokenized together; a group begins where the one before it ended
    position    where the next row of a stream begins: its epoch, the pieces before its group, the tokens used of it

Row i of a stream holds its tokens [i * S, i * S + S) and asks for those one further on, as windows do (`windows.py`).
A position is all that it takes to go on: the group is tokenized again.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from titan_data.errors import DataError
from titan_data.pieces import PIECE_CHARS, grouped
from titan_data.rows import RowArrays
from titan_data.source import Piece
from titan_data.streams import EpochProgress, StreamSource
from titan_data.tokenizer import Tokenizer

# Of text in a group: enough to keep the tokenizer busy, and little to tokenize again when a run resumes.
_GROUP_CHARS = 4 * PIECE_CHARS


class Position(NamedTuple):
    """Where a stream goes on."""

    epoch: int = 0
    pieces: int = 0
    """Before the group."""
    tokens: int = 0
    """Used of the group."""


class _Group(NamedTuple):
    start: Position
    read: tuple[float, float]
    """How much of the epoch is read before and after it."""
    tokens: NDArray[np.uint32]
    begins: NDArray[np.bool_]
    """Whether a document begins with the token."""


@dataclass(frozen=True)
class StreamRows:
    """How rows are made of streams; picklable."""

    source: StreamSource
    tokenizer: Tokenizer
    streams: int
    seq_len: int
    confine_attention: bool = True

    def open(self, stream: int, position: Position) -> "OpenStream":
        """Goes on with a stream at a position."""
        return OpenStream(self, stream, position)


@dataclass
class OpenStream:
    """A stream that is being read."""

    rows: StreamRows
    stream: int
    position: Position
    """Where the next row begins."""
    _groups: deque[_Group] = field(default_factory=deque)
    _ahead: Iterator[_Group] = field(init=False)

    def __post_init__(self) -> None:
        self._ahead = self._tokenize(self.position)

    @property
    def epochs(self) -> float:
        """How many times the stream has been read, as far as its source knows; whole until the first row is taken."""
        if not self._groups:
            return float(self.position.epoch)
        group = self._groups[0]
        before, after = group.read
        return self.position.epoch + before + (after - before) * self.position.tokens / len(group.tokens)

    def take(self, count: int) -> RowArrays:
        """Returns the next rows: four int64 [count, seq_len], as `rows.py` describes them.

        Raises:
            DataError: if the stream has no documents, or what the source raises.
        """
        S = self.rows.seq_len
        both = np.empty((count, S + 1), dtype=np.int64)
        begins = np.empty((count, S + 1), dtype=np.bool_)
        for row in range(count):
            self._fill(both[row], begins[row])
            self._advance(S)
        begins = begins[:, :-1]
        begins[:, 0] = True
        places = np.broadcast_to(np.arange(S), (count, S))
        if not self.rows.confine_attention:
            begins[:, 1:] = False
        return {
            "tokens": both[:, :-1].copy(),
            "labels": both[:, 1:].copy(),
            "positions": places - np.maximum.accumulate(np.where(begins, places, 0), axis=1),
            "document_ids": np.cumsum(begins, axis=1) - 1,
        }

    def _fill(self, tokens: NDArray[np.int64], begins: NDArray[np.bool_]) -> None:
        """Copies the tokens from the position on, without moving it."""
        filled, skipped = 0, self.position.tokens
        for number in itertools.count():
            if number == len(self._groups):
                self._groups.append(next(self._ahead))
            group = self._groups[number]
            count = min(len(tokens) - filled, len(group.tokens) - skipped)
            tokens[filled : filled + count] = group.tokens[skipped : skipped + count]
            begins[filled : filled + count] = group.begins[skipped : skipped + count]
            filled, skipped = filled + count, 0
            if filled == len(tokens):
                return

    def _advance(self, count: int) -> None:
        used = self.position.tokens + count
        # The label of the row's last token comes next, so there is a group that holds it.
        while used >= len(self._groups[0].tokens):
            used -= len(self._groups.popleft().tokens)
        self.position = self._groups[0].start._replace(tokens=used)

    def _tokenize(self, position: Position) -> Iterator[_Group]:
        epoch, done = position.epoch, position.pieces
        # Not known of a document that is being resumed; but then its beginning lies before the row.
        beginning = True
        while True:
            found = done > 0
            progress = EpochProgress()
            pieces = self.rows.source.pieces(self.stream, self.rows.streams, epoch, progress)
            for _ in itertools.islice(pieces, done):
                pass  # consumed before the position
            before = progress.share
            for group in grouped(pieces, _GROUP_CHARS):
                tokens, begins = self._encode(group, beginning)
                beginning = group[-1].ends_document
                if len(tokens):
                    found = True
                    yield _Group(Position(epoch, done), (before, progress.share), tokens, begins)
                done += len(group)
                before = progress.share
            if not found:
                raise DataError(
                    f"stream {self.stream} of {self.rows.streams} has no documents. Choose fewer streams: each needs "
                    "some."
                )
            epoch, done = epoch + 1, 0

    def _encode(self, pieces: Sequence[Piece], beginning: bool) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """The tokens of a group, and where documents begin; `beginning` tells whether one does with the group."""
        end = np.array([self.rows.tokenizer.eos_id], dtype=np.uint32)
        tokens: list[NDArray[np.uint32]] = []
        begins: list[NDArray[np.bool_]] = []
        for piece, ids in zip(pieces, self.rows.tokenizer.encode_batch([p.text for p in pieces]), strict=True):
            # An empty document is left out.
            stretch = np.concatenate([ids, end]) if piece.ends_document and len(ids) else np.asarray(ids)
            flags = np.zeros(len(stretch), dtype=np.bool_)
            flags[:1] = beginning
            tokens.append(stretch)
            begins.append(flags)
            beginning = piece.ends_document
        return np.concatenate(tokens), np.concatenate(begins)
