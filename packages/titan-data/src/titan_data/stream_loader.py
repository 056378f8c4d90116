"""Batches of text that can only stream, or is tokenized on the fly: the loader of virtual streams.

Row j of global batch t belongs to stream j // k, where k = B / streams rows of a batch come from each stream; it is
that stream's row t * k + j % k. A rank reads whole streams, so their number is a multiple of the number of ranks. Which
rank reads a stream makes no difference to its rows. The state of a loader is the positions of its own streams, under
their numbers: a checkpoint of all ranks holds all streams, and a loader of any layout finds in it those it needs.

Worker processes share out the streams of a rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from titan_data.loader import Batch, pinned_if
from titan_data.read_ahead import ReadAhead
from titan_data.rows import RowArrays
from titan_data.stream_rows import OpenStream, Position, StreamRows

_Positions = dict[int, Position]


class StreamLoader:
    """An endless iterator over one rank's rows of every global batch of virtual streams; `Stateful` for checkpoints.

    Batches are those of `BatchLoader`; a row's id in `sample_ids` is its number in its stream times the number of
    streams, and the stream's number.
    """

    def __init__(
        self,
        streams: StreamRows,
        *,
        global_batch_size: int,
        rank: int = 0,
        rows: int | None = None,
        prefetch: int = 2,
        workers: int = 0,
        timeout_seconds: float = 600.0,
        pin_memory: bool = False,
    ) -> None:
        """Prepares to read from global batch 0.

        Args:
            streams: the streams, and how rows are made of them.
            global_batch_size: rows of a global batch, over all ranks; a multiple of the number of streams.
            rank: which `rows` of the global batch are read.
            rows: rows in each batch of this rank; default: the whole global batch.
            prefetch: batches that a thread, or the workers, prepare ahead; 0 starts no thread.
            workers: processes that prepare batches, at most one for each stream of the rank; 0: a thread does.
            timeout_seconds: how long a batch may take to come, if it is prepared ahead.
            pin_memory: put batches into page-locked memory; takes an accelerator.

        Raises:
            ValueError: for sizes that mean nothing or cannot be shared out.
        """
        rows = global_batch_size if rows is None else rows
        if streams.streams < 1 or global_batch_size < 1 or global_batch_size % streams.streams:
            raise ValueError(
                f"a global batch of {global_batch_size} rows cannot take equally many of {streams.streams} streams. "
                "Choose a number of streams that divides it."
            )
        self._each = global_batch_size // streams.streams
        if rows < 1 or rows % self._each or global_batch_size % rows or not 0 <= rank < global_batch_size // rows:
            raise ValueError(
                f"rank {rank} with {rows} of {global_batch_size} rows does not read whole streams, of which each has "
                f"{self._each} rows. The number of data-parallel ranks has to divide the {streams.streams} streams."
            )
        first = rank * rows // self._each
        self._own = range(first, first + rows // self._each)
        if workers < 0 or workers > len(self._own):
            raise ValueError(f"{workers} workers cannot share out the {len(self._own)} streams of this rank")
        if prefetch < min(workers, 1) or not timeout_seconds > 0:
            raise ValueError(
                f"prefetch is {prefetch} and timeout_seconds is {timeout_seconds}; workers take a prefetch of at least "
                "1, and a batch takes time"
            )
        self._streams, self._prefetch, self._workers = streams, prefetch, workers
        self._timeout, self._pin_memory = timeout_seconds, pinned_if(pin_memory)
        self._next_batch = 0
        self._positions: _Positions = dict.fromkeys(self._own, Position())
        self._epochs = dict.fromkeys(self._own, 0.0)
        self._ahead: _Ahead | None = None
        streams.tokenizer.speed_up()

    @property
    def epoch(self) -> float:
        """How many times the stream of this rank that is furthest behind has been read so far, e.g. 1.37.

        What an epoch has beyond whole ones is by the size of what has been read. It is left out for sources that do not
        know their size, such as datasets that stream from the hub, and until the first batch after a restart.
        """
        return min(self._epochs.values())

    def __iter__(self) -> "StreamLoader":
        return self

    def __next__(self) -> Batch:
        try:
            if self._ahead is None or self._ahead.forked:
                self._ahead = self._start()
            results = [self._ahead.take() for _ in range(max(1, self._workers))]
        except BaseException:
            # Readers are past the positions that stand here; the next call begins again from these.
            self.close()
            raise
        for result in results:
            self._positions |= result.positions
            self._epochs |= result.epochs
        self._next_batch += 1
        arrays = {name: np.concatenate([result.arrays[name] for result in results]) for name in results[0].arrays}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {name: tensor.pin_memory() for name, tensor in tensors.items()} if self._pin_memory else tensors

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of batches handed out, and where each stream of this rank goes on."""
        positions = {str(stream): torch.tensor(position) for stream, position in self._positions.items()}
        return {"next_batch": self._next_batch, "streams": positions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where these streams were, whatever ranks have read them.

        Raises:
            ValueError: if the state lacks one of this rank's streams, or is none.
        """
        next_batch, positions = state_dict.get("next_batch"), state_dict.get("streams", {})
        missing = [stream for stream in self._own if str(stream) not in positions]
        if not isinstance(next_batch, int) or next_batch < 0 or missing:
            raise ValueError(
                f"not the state of a StreamLoader of {self._streams.streams} streams: it holds next_batch {next_batch} "
                f"and {len(positions)} streams, and lacks {missing}"
            )
        self.close()
        self._next_batch = next_batch
        self._positions = {stream: Position(*map(int, positions[str(stream)])) for stream in self._own}
        self._epochs = {stream: float(position.epoch) for stream, position in self._positions.items()}

    def close(self) -> None:
        """Stops the thread or the processes; a later `next` starts them again at the right place."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _start(self) -> "_Ahead":
        shares = max(1, self._workers)
        bounds = [len(self._own) * share // shares for share in range(shares + 1)]
        reader = _Reader(
            self._streams,
            self._each,
            tuple(
                tuple((stream, self._positions[stream]) for stream in self._own[bounds[share] : bounds[share + 1]])
                for share in range(shares)
            ),
        )
        first = self._next_batch * shares
        if self._workers:
            from titan_data.worker_processes import WorkerProcesses

            return WorkerProcesses(
                reader.read,
                first,
                workers=self._workers,
                depth=self._prefetch * self._workers,
                timeout_seconds=self._timeout,
            )
        return ReadAhead(reader.read, first, self._prefetch, self._timeout) if self._prefetch else _Now(reader, first)


@dataclass(frozen=True)
class _Rows:
    """Rows of some streams, where these go on after them, and how many times they have been read then."""

    arrays: RowArrays
    positions: _Positions
    epochs: dict[int, float]


class _Ahead(Protocol):
    @property
    def forked(self) -> bool: ...

    def take(self) -> _Rows: ...

    def close(self) -> None: ...


@dataclass
class _Reader:
    """Reads the shares of a rank's streams, each share in turn: number n is share n % shares of batch n // shares."""

    streams: StreamRows
    each: int
    shares: Sequence[Sequence[tuple[int, Position]]]

    def __post_init__(self) -> None:
        self._opened: dict[int, list[OpenStream]] = {}

    def read(self, number: int) -> _Rows:
        batch, share = divmod(number, len(self.shares))
        if share not in self._opened:
            self._opened[share] = [self.streams.open(stream, position) for stream, position in self.shares[share]]
        opened = self._opened[share]
        taken = [stream.take(self.each) for stream in opened]
        arrays = {name: np.concatenate([rows[name] for rows in taken]) for name in taken[0]}
        numbers = np.arange(batch * self.each, (batch + 1) * self.each)
        ids = [numbers * self.streams.streams + stream.stream for stream in opened]
        return _Rows(
            arrays | {"sample_ids": np.concatenate(ids)},
            {stream.stream: stream.position for stream in opened},
            {stream.stream: stream.epochs for stream in opened},
        )


class _Now:
    """Reads when it is asked, and not ahead."""

    forked = False

    def __init__(self, reader: _Reader, first: int) -> None:
        self._reader, self._number = reader, first

    def take(self) -> _Rows:
        rows = self._reader.read(self._number)
        self._number += 1
        return rows

    def close(self) -> None:
        """There is nothing to end."""
