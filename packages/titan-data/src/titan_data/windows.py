"""Cutting the token stream into rows: concatenate and split, with every token predicted exactly once.

The stream is all documents in a row, each followed by its end-of-text token. Window i feeds tokens
[i * S, i * S + S) to the model and asks for the tokens one further on, also where that is the next document's
first: n = ceil((N - 1) / S) windows cover N tokens, and each token but the stream's first is a label once an
epoch. The last window may be short; it is padded, and padding has no loss.
"""

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from titan_data.errors import DataError
from titan_data.rows import IGNORED_LABEL, NO_ROW, RowArrays


@runtime_checkable
class TokenStream(Protocol):
    """Documents' tokens in a row, on disk or in memory."""

    @property
    def token_count(self) -> int:
        """How many tokens there are: N."""
        ...

    @property
    def document_starts(self) -> NDArray[np.int64]:
        """Where each of the D documents begins, then N: strictly increasing int64 [D + 1], the first is 0."""
        ...

    @property
    def eos_id(self) -> int:
        """The token that ends each document; padding is made of it."""
        ...

    def copy_tokens(self, start: int, out: NDArray[np.integer]) -> None:
        """Copies the tokens from `start` on into `out`, [T], in time that does not depend on `start`."""
        ...


class TokenWindows:
    """The windows of a token stream; `Rows`."""

    def __init__(self, stream: TokenStream, *, seq_len: int, confine_attention: bool = True) -> None:
        """Cuts a stream into windows of `seq_len` tokens.

        Raises:
            ValueError: if `seq_len` is below 1.
            DataError: if there are fewer than 2 tokens: nothing to predict.
        """
        self._count = count_windows(stream.token_count, seq_len)
        self.stream, self.seq_len, self.confine_attention = stream, seq_len, confine_attention

    def __getstate__(self) -> dict[str, object]:
        # A process that only reads windows needs no tokenizer, which a `TokenDataset` has beside its store.
        return self.__dict__ | {"stream": getattr(self.stream, "store", self.stream)}

    @property
    def tokens_per_row(self) -> float:
        """All windows but the last are full."""
        return self.seq_len

    @property
    def documents_per_row(self) -> float:
        """How many documents there are for each window."""
        return (len(self.stream.document_starts) - 1) / self._count

    def __len__(self) -> int:
        return self._count

    def read(self, rows: NDArray[np.int64]) -> RowArrays:
        """Returns these windows, as `cut_windows` does."""
        return cut_windows(self.stream, rows, seq_len=self.seq_len, confine_attention=self.confine_attention)


def count_windows(token_count: int, seq_len: int) -> int:
    """Returns how many windows of `seq_len` tokens it takes to predict each token but the first.

    Raises:
        ValueError: if `seq_len` is below 1.
        DataError: if there are fewer than 2 tokens: nothing to predict.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; a window needs at least 1 token")
    if token_count < 2:
        raise DataError(f"the data has {token_count} token(s); predicting the next one takes at least 2")
    return -(-(token_count - 1) // seq_len)


def cut_windows(
    stream: TokenStream, windows: NDArray[np.int64], *, seq_len: int, confine_attention: bool = True
) -> RowArrays:
    """Returns the rows of a batch: the chosen windows of the stream.

    Args:
        stream: the tokens and where their documents begin.
        windows: int64 [R], one window a row; `NO_ROW` makes a row of nothing but padding.
        seq_len: tokens in a row, S.
        confine_attention: count documents within each row; if false, a row is one document.

    Returns:
        Four int64 [R, S] arrays. `tokens`; `labels`, the next tokens, `IGNORED_LABEL` where there is none;
        `positions`, from 0 at each document's start or at the row's, if the document began before it;
        `document_ids`, 0, 1, 2, ... within the row, where padding is a document of its own.
    """
    R, S = len(windows), seq_len
    starts = np.where(windows == NO_ROW, stream.token_count - 1, windows * S)
    lengths = np.minimum(stream.token_count - 1 - starts, S)

    # One allocation, because the allocator returns several large ones to the system and has to ask for them again,
    # page by page, for each batch.
    tokens, labels, positions, document_ids = np.empty((4, R, S), dtype=np.int64)
    both = np.empty(S + 1, dtype=np.int64)
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        stream.copy_tokens(start, both[: length + 1])
        tokens[row], labels[row] = both[:-1], both[1:]
        tokens[row, length:] = stream.eos_id
        labels[row, length:] = IGNORED_LABEL

    if confine_attention:
        begins = _document_begins(stream.document_starts, starts, lengths, S)
        _count_documents(begins, positions, document_ids)
    else:
        positions[:] = np.arange(S)
        document_ids[:] = 0
    return {"tokens": tokens, "labels": labels, "positions": positions, "document_ids": document_ids}


def _document_begins(
    document_starts: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64], S: int
) -> NDArray[np.int64]:
    """Where a document, or padding, begins inside a row, in the flat index over all R * S places."""
    row_offsets = np.arange(len(starts)) * S
    # The documents that begin in row r, but not with its first token, are first[r] <= d < last[r].
    first = np.searchsorted(document_starts, starts, side="right")
    last = np.maximum(first, np.searchsorted(document_starts, starts + lengths, side="left"))
    counts = last - first
    # Spelt out, rows are 0 0 0 1 1 ... and documents first[0], first[0] + 1, first[0] + 2, first[1], ...
    rows = np.repeat(np.arange(len(starts)), counts)
    documents = np.arange(len(rows)) + (first - np.cumsum(counts) + counts)[rows]
    inside = document_starts[documents] - starts[rows] + row_offsets[rows]
    padded = (lengths > 0) & (lengths < S)
    return np.concatenate([inside, row_offsets[padded] + lengths[padded]])


def _count_documents(begins: NDArray[np.int64], positions: NDArray[np.int64], document_ids: NDArray[np.int64]) -> None:
    """Fills both [R, S] arrays in place, as running sums of the steps from one token to the next."""
    R, S = positions.shape
    document_ids[:] = 0
    document_ids.reshape(-1)[begins] = 1
    np.cumsum(document_ids, axis=1, out=document_ids)

    segments = np.sort(np.concatenate([np.arange(R) * S, begins]))
    positions[:] = 1
    positions.reshape(-1)[segments] = 1 - np.diff(segments, prepend=-1)
    np.cumsum(positions.reshape(-1), out=positions.reshape(-1))
