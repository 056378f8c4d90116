"""The batches a rank trains on: rows of global batches, read ahead by a thread, resumable by one number.

Glossary:

    global batch   the B sequences of one optimizer step over all ranks, in the order that `order.py` fixes
    rank           here: the place among the readers of different rows (data parallel), not among all processes
    rows           how many rows a rank reads of each global batch: rank r owns [r * rows, r * rows + rows)
    next batch     the number of global batches taken so far, which is the whole state of a loader

Rows beyond the global batch are padding without labels, so that every rank has the same shapes when B is not a
multiple of the number of ranks.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from titan_data.order import Order
from titan_data.read_ahead import ReadAhead
from titan_data.windows import NO_WINDOW, TokenStream, count_windows, cut_windows

Batch = dict[str, torch.Tensor]


class BatchLoader:
    """An endless iterator over one rank's rows of every global batch; `Stateful` for checkpoints.

    Each batch holds int64 CPU tensors: `tokens`, `labels`, `positions` and `document_ids` [rows, seq_len] as
    `windows.cut_windows` describes them, and `sample_ids` [rows], the window each row shows, -1 for padding.
    """

    def __init__(
        self,
        dataset: TokenStream,
        *,
        seq_len: int,
        global_batch_size: int,
        seed: int,
        shuffle: bool = True,
        confine_attention: bool = True,
        rank: int = 0,
        rows: int | None = None,
        prefetch: int = 2,
    ) -> None:
        """Prepares to read from global batch 0.

        Args:
            dataset: the token stream, usually a `TokenDataset`.
            seq_len: tokens in a row.
            global_batch_size: rows of a global batch, over all ranks.
            seed: fixes the order, together with the data.
            shuffle: read the windows in a new random order each epoch, or in the stream's.
            confine_attention: restart positions and document ids at each document.
            rank: which `rows` of the global batch are read.
            rows: rows in each batch of this rank; default: the whole global batch.
            prefetch: batches that a thread prepares ahead; 0 starts no thread.

        Raises:
            ValueError: for a size below 1, a negative rank or prefetch, or a stream too short to predict from.
        """
        rows = global_batch_size if rows is None else rows
        for name, value, least in (
            ("global_batch_size", global_batch_size, 1),
            ("rows", rows, 1),
            ("rank", rank, 0),
            ("prefetch", prefetch, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self._order = Order(
            window_count=count_windows(len(dataset.tokens), seq_len),
            global_batch_size=global_batch_size,
            seed=seed,
            shuffle=shuffle,
        )
        self._rows = _Rows(dataset, self._order, seq_len, confine_attention, rank * rows, rows)
        self._prefetch = prefetch
        self._next_batch = 0
        self._ahead: ReadAhead[Batch] | None = None

    @property
    def epoch(self) -> float:
        """How many times the data has been read so far, by all ranks together, e.g. 1.37."""
        return self._order.epoch(self._next_batch)

    def __iter__(self) -> "BatchLoader":
        return self

    def __next__(self) -> Batch:
        try:
            batch = self._take()
        except BaseException:
            # Whatever was read ahead no longer fits a batch number that has not moved, so it is dropped: the next
            # call reads this same batch again.
            self.close()
            raise
        self._next_batch += 1
        return batch

    def _take(self) -> Batch:
        if self._prefetch == 0:
            return self._rows.read(self._next_batch)
        if self._ahead is None or self._ahead.forked:
            self._ahead = ReadAhead(self._rows.read, self._next_batch, self._prefetch)
        return self._ahead.take()

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of batches handed out; what was only read ahead does not count."""
        return {"next_batch": self._next_batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues after the batches that a state counts, whatever number of ranks it was saved by.

        Raises:
            ValueError: if the state is not one of a `BatchLoader`.
        """
        next_batch = state_dict.get("next_batch")
        if not isinstance(next_batch, int) or next_batch < 0:
            raise ValueError(f"not the state of a BatchLoader: {state_dict!r} has no 'next_batch' of 0 or more")
        self.close()
        self._next_batch = next_batch

    def close(self) -> None:
        """Stops the thread; a later `next` starts it again at the right batch."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


@dataclass(frozen=True)
class _Rows:
    """One rank's rows of any global batch."""

    stream: TokenStream
    order: Order
    seq_len: int
    confine_attention: bool
    first_row: int
    rows: int

    def read(self, batch: int) -> Batch:
        end = min(self.first_row + self.rows, self.order.global_batch_size)
        owned = self.order.windows(batch, range(self.first_row, max(self.first_row, end)))
        windows = np.full(self.rows, NO_WINDOW, dtype=np.int64)
        windows[: len(owned)] = owned
        arrays = cut_windows(self.stream, windows, seq_len=self.seq_len, confine_attention=self.confine_attention)
        return {name: torch.from_numpy(array) for name, array in (arrays | {"sample_ids": windows}).items()}
