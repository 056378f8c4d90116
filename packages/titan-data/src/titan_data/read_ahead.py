"""A thread that computes the next results of a numbered sequence while the last one is in use.

It is a thread, not a process: what a batch takes is copying out of mapped memory, during which numpy lets go of the
interpreter lock.
"""

import os
import queue
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from titan_data.errors import ReadingError

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Calls `read(first)`, `read(first + 1)`, ... in a thread and keeps up to `depth` results ready.

    A result that takes longer than `timeout_seconds` counts as one that will never come.

    The thread holds no reference to this object, so dropping it, or leaving Python, ends the thread.
    """

    def __init__(self, read: Callable[[int], T], first: int, depth: int, timeout_seconds: float = 600.0) -> None:
        """Starts the thread."""
        self._timeout = timeout_seconds
        self._ready: queue.SimpleQueue[T | _Failure] = queue.SimpleQueue()
        self._free = threading.Semaphore(depth)
        self._stop = stop = threading.Event()
        thread = threading.Thread(
            target=_run, args=(read, first, self._ready, self._free, stop), name="titan-data", daemon=True
        )
        thread.start()
        self._thread = thread
        self._pid = os.getpid()
        self._end = weakref.finalize(self, _end, thread, self._free, stop)

    @property
    def forked(self) -> bool:
        """Whether this is a copy in a forked child, where there is no thread, and nothing to take."""
        return os.getpid() != self._pid

    def take(self) -> T:
        """Returns the next result, waiting for it if need be.

        Raises:
            BaseException: what `read` raised for it, with the traceback of the thread.
            ReadingError: if it does not come in time; with the place where the thread is.
        """
        try:
            result = self._ready.get(timeout=self._timeout)
        except queue.Empty:
            self._end.detach()  # nobody may wait for this thread; should it come back, it ends
            self._stop.set()
            self._free.release()
            frame = sys._current_frames().get(self._thread.ident or 0)
            where = "".join(traceback.format_stack(frame)) if frame else "nowhere: the thread has died"
            raise ReadingError(
                f"the next batch has not come for {self._timeout:g} seconds. Look at the disk or network that it is "
                f"read from; if it is only slow, raise timeout_seconds. The thread that reads it is at\n{where}"
            ) from None
        if isinstance(result, _Failure):
            raise result.error
        self._free.release()
        return result

    def close(self) -> None:
        """Ends the thread, after the result it is at."""
        self._end()


@dataclass(frozen=True)
class _Failure:
    error: BaseException


def _run(
    read: Callable[[int], T],
    number: int,
    ready: "queue.SimpleQueue[T | _Failure]",
    free: threading.Semaphore,
    stop: threading.Event,
) -> None:
    while True:
        free.acquire()
        if stop.is_set():
            return
        try:
            ready.put(read(number))
        except BaseException as error:  # whatever it was, it belongs to the consumer
            ready.put(_Failure(error))
            return
        number += 1


def _end(thread: threading.Thread, free: threading.Semaphore, stop: threading.Event) -> None:
    if not thread.is_alive():  # in a forked child, the semaphore may have been copied while it was held
        return
    stop.set()
    free.release()
    if thread is not threading.current_thread():  # the garbage collector runs in any thread
        thread.join()
