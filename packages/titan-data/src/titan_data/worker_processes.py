"""Worker processes that compute the next results of a numbered sequence, on torchdata's `StatefulDataLoader`.

Results come in order, each from one worker. The sequence can begin at any number, so no state of a worker is kept.

Workers are forked from a server that has only imported this package (Python's "forkserver"): not from the training
process, whose GPU and threads do not survive a fork. What they are given has to be picklable. When the training process
is gone, however it ended, so are they and, after the last of them, the server.

A worker that dies, or takes longer over one result than it may, is an error within some five seconds of it: the worker
watches itself, writes down where it is, and ends.
"""

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Generic, TypeVar, cast

import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from titan_data.errors import ReadingError
from titan_data.orphans import end_with_parent
from titan_data.threads import one_thread

T = TypeVar("T")

_running: "weakref.WeakSet[WorkerProcesses]" = weakref.WeakSet()
# Iterators that a forked child has copies of. Dropping such a copy would end the parent's workers.
_inherited: list[object] = []
os.register_at_fork(after_in_child=lambda: _inherited.extend(processes._iterator for processes in _running))

# No state of the loader's own is asked for, so none is to be collected.
_NEVER = 1 << 60


class WorkerProcesses(Generic[T]):
    """Calls `read(first)`, `read(first + 1)`, ... in processes and keeps results ready."""

    def __init__(
        self,
        read: Callable[[int], T],
        first: int,
        *,
        workers: int,
        depth: int,
        timeout_seconds: float,
    ) -> None:
        """Starts the processes.

        Args:
            read: computes a result; picklable, as its results are. Arrays travel as bytes: torch tensors would be
                handed over as open files, of which there are not many, and which are lost with a worker that dies.
            first: the number to begin with.
            workers: processes, at least 1.
            depth: results to keep ready, at least 1, rounded up to a multiple of `workers`.
            timeout_seconds: how long a result may take.

        Raises:
            ReadingError: if `read` cannot be sent to another process.
        """
        try:
            pickle.dumps(read)
        except Exception as error:  # whatever an object's own pickling raises
            raise ReadingError(
                f"the dataset cannot be sent to worker processes ({error}). Make it picklable, or read it with "
                "workers=0."
            ) from error
        self._timeout = timeout_seconds
        self._pid = os.getpid()
        self._folder = Path(tempfile.mkdtemp(prefix="titan-data-"))
        self._end = weakref.finalize(self, _remove, self._folder, self._pid)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        with warnings.catch_warnings():
            # Of torchdata 0.11, which calls what torch 2.13 deprecates.
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            loader = StatefulDataLoader(
                _Numbered(read, self._folder, timeout_seconds),
                batch_size=None,
                sampler=_From(first),
                num_workers=workers,
                prefetch_factor=-(-depth // workers),
                collate_fn=_unchanged,
                multiprocessing_context=context,
                worker_init_fn=_start,
                snapshot_every_n_steps=_NEVER,
            )
        try:
            self._iterator: Iterator[T] | None = iter(loader)
        except ChildProcessError as error:  # of the server, which is a child of the parent
            raise ReadingError(
                "a process that was forked cannot have worker processes if its parent has had some. Read with "
                "workers=0 in it."
            ) from error
        _running.add(self)

    @property
    def forked(self) -> bool:
        """Whether this is a copy in a forked child, to which the workers do not belong."""
        return os.getpid() != self._pid

    def take(self) -> T:
        """Returns the next result, waiting for it if need be.

        Raises:
            BaseException: what `read` raised for it, with the worker's traceback in its message.
            ReadingError: if a worker has died or does not come to an end; with the place where it was.
        """
        try:
            return next(cast(Iterator[T], self._iterator))
        except (RuntimeError, OSError, EOFError) as error:
            if "in DataLoader worker process" in str(error):
                raise  # what `read` raised; all else is that a worker, or what it was sending, is gone
            for path in sorted(self._folder.iterdir()):
                if where := path.read_text():
                    raise ReadingError(
                        f"a worker process has not finished a batch in {self._timeout:g} seconds and was ended. If the "
                        f"data is only slow to read, raise timeout_seconds. It was at\n{where}"
                    ) from error
            raise ReadingError(
                f"a worker process that reads data has died ({error}). If the system ran out of memory, which its log "
                "says, use fewer workers; workers=0 reads in this process and shows other faults."
            ) from error

    def close(self) -> None:
        """Ends the processes."""
        self._iterator = None
        self._end()


class _From:
    """The numbers from the first on."""

    def __init__(self, first: int) -> None:
        self._first = first

    def __iter__(self) -> Iterator[int]:
        number = self._first
        while True:
            yield number
            number += 1


class _Numbered(Dataset):
    """What a worker holds."""

    def __init__(self, read: Callable[[int], object], folder: Path, timeout_seconds: float) -> None:
        self._read, self._folder, self._timeout = read, folder, timeout_seconds
        self._where: IO[str] | None = None

    def __getitem__(self, index: int) -> object:
        if self._where is None:
            self._where = (self._folder / f"{os.getpid()}.txt").open("w")
        faulthandler.dump_traceback_later(self._timeout, exit=True, file=self._where)
        try:
            return self._read(index)
        finally:
            faulthandler.cancel_dump_traceback_later()


def _start(worker: int) -> None:
    end_with_parent()  # the loader's own watchdog looks at the server instead
    torch.set_num_threads(1)
    one_thread()


def _unchanged(item: T) -> T:
    return item


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() != pid:
        return
    for path in folder.glob("*"):
        path.unlink(missing_ok=True)
    folder.rmdir()
