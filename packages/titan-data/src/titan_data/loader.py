"""The batches a rank trains on: rows of global batches, read ahead, resumable by one number.

Glossary:

    global batch   the B sequences of one optimizer step over all ranks, in the order that `order.py` fixes
    rank           here: the place among the readers of different rows (data parallel), not among all processes
    rows           how many rows a rank reads of each global batch: rank r owns [r * rows, r * rows + rows)
    next batch     the number of global batches taken so far, which is the whole state of a loader

Rows beyond the global batch are padding without labels, so that every rank has the same shapes when B is not a
multiple of the number of ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from titan_data.order import ShuffledRows
from titan_data.read_ahead import ReadAhead
from titan_data.rows import NO_ROW, RowArrays, Rows, Samples
from titan_data.windows import TokenStream, TokenWindows

Batch = dict[str, torch.Tensor]


class Ahead(Protocol):
    """What prepares batches while others are in use."""

    @property
    def forked(self) -> bool:
        """Whether it belongs to the process that this one was forked from."""
        ...

    def take(self) -> RowArrays:
        """Returns the next batch."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


class BatchLoader:
    """An endless iterator over one rank's rows of every global batch; `Stateful` for checkpoints.

    Each batch holds int64 CPU tensors: `tokens`, `labels`, `positions` and `document_ids` [rows, seq_len] as
    `rows.py` describes them, and `sample_ids` [rows], the row of the data that each row shows, -1 for padding.
    """

    def __init__(
        self,
        dataset: TokenStream | Rows | Samples,
        *,
        global_batch_size: int,
        seq_len: int | None = None,
        seed: int | None = None,
        shuffle: bool = True,
        confine_attention: bool = True,
        rank: int = 0,
        rows: int | None = None,
        prefetch: int = 2,
        workers: int = 0,
        timeout_seconds: float = 600.0,
        pin_memory: bool = False,
    ) -> None:
        """Prepares to read from global batch 0.

        Args:
            dataset: a token stream, usually a `TokenDataset`; or rows of another kind; or, already in order, samples,
                such as a `Mixture`.
            global_batch_size: rows of a global batch, over all ranks.
            seq_len: tokens in a row; only for a token stream, which is cut into windows of so many.
            seed: fixes the order, together with the data; samples have one of their own.
            shuffle: read the rows in a new random order each epoch, or in the dataset's; not for samples.
            confine_attention: restart positions and document ids at each document; for a token stream.
            rank: which `rows` of the global batch are read.
            rows: rows in each batch of this rank; default: the whole global batch.
            prefetch: batches that a thread, or the workers, prepare ahead; 0 starts no thread.
            workers: processes that prepare batches; 0: a thread does. See `worker_processes.py`.
            timeout_seconds: how long a batch may take to come, if it is prepared ahead.
            pin_memory: put batches into page-locked memory; takes an accelerator.

        Raises:
            ValueError: for a size below 1, a negative rank or prefetch, an option that the dataset has no use for or
                lacks or this machine cannot follow, or a stream too short to predict from.
        """
        rows = global_batch_size if rows is None else rows
        for name, value, least in (
            ("global_batch_size", global_batch_size, 1),
            ("rows", rows, 1),
            ("rank", rank, 0),
            ("prefetch", prefetch, min(workers, 1)),
            ("workers", workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if not timeout_seconds > 0:
            raise ValueError(f"timeout_seconds is {timeout_seconds}; it must be above 0")
        self._samples = _in_order(dataset, seq_len, seed, shuffle, confine_attention)
        self._rows = _Share(self._samples, global_batch_size, rank * rows, rows)
        self._prefetch, self._workers = prefetch, workers
        self._timeout, self._pin_memory = timeout_seconds, pinned_if(pin_memory)
        self._next_batch = 0
        self._ahead: Ahead | None = None

    @property
    def epoch(self) -> float:
        """How many times the data has been read so far, by all ranks together, e.g. 1.37; a mixture's on average."""
        return self._next_batch * self._rows.global_batch_size / self._samples.row_count

    @property
    def epochs(self) -> Mapping[str, float]:
        """How many times each source has been read so far, by all ranks together, e.g. {"wiki": 1.37}."""
        return self._samples.epochs(self._next_batch * self._rows.global_batch_size)

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
            return self._finish(self._rows.read(self._next_batch))
        if self._ahead is None or self._ahead.forked:
            self._ahead = self._start()
        return self._finish(self._ahead.take())

    def _start(self) -> "Ahead":
        if not self._workers:
            return ReadAhead(self._rows.read, self._next_batch, self._prefetch, self._timeout)
        from titan_data.worker_processes import WorkerProcesses

        return WorkerProcesses(
            self._rows.read,
            self._next_batch,
            workers=self._workers,
            depth=self._prefetch,
            timeout_seconds=self._timeout,
        )

    def _finish(self, arrays: RowArrays) -> Batch:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {name: tensor.pin_memory() for name, tensor in tensors.items()} if self._pin_memory else tensors

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
        """Stops the thread or the processes; a later `next` starts them again at the right batch."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def pinned_if(wanted: bool) -> bool:
    """Returns whether batches are to be pinned.

    Raises:
        ValueError: if they are, on a machine where nothing can be.
    """
    if wanted and not torch.accelerator.is_available():
        raise ValueError("pin_memory is on, but there is no accelerator to copy to. Leave it out on this machine.")
    return wanted


def _in_order(
    dataset: TokenStream | Rows | Samples, seq_len: int | None, seed: int | None, shuffle: bool, confine_attention: bool
) -> Samples:
    if isinstance(dataset, Samples):
        if seq_len is not None or seed is not None or not (shuffle and confine_attention):
            raise ValueError(
                "seq_len, seed, shuffle and confine_attention are fixed where samples are put in order. Give them to "
                f"the {type(dataset).__name__}, not to its loader."
            )
        return dataset
    if seed is None:
        raise ValueError("seed is missing: the order of the rows depends on it")
    if isinstance(dataset, TokenStream):
        if seq_len is None:
            raise ValueError("seq_len is missing: a token stream is cut into windows of so many tokens")
        dataset = TokenWindows(dataset, seq_len=seq_len, confine_attention=confine_attention)
    elif seq_len is not None or not confine_attention:
        raise ValueError(
            "seq_len and confine_attention are for a token stream; the rows of this dataset are as long and as "
            "confined as they were made."
        )
    return ShuffledRows(dataset, seed=seed, shuffle=shuffle)


@dataclass(frozen=True)
class _Share:
    """One rank's rows of any global batch."""

    samples: Samples
    global_batch_size: int
    first_row: int
    rows: int

    def read(self, batch: int) -> RowArrays:
        rows = np.arange(self.first_row, self.first_row + self.rows, dtype=np.int64)
        return self.samples.read(np.where(rows < self.global_batch_size, batch * self.global_batch_size + rows, NO_ROW))
