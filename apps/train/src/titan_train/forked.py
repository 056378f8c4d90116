"""Runs a function on many arguments, each in a forked process of its own that has everything imported already."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TextIO, TypeVar, cast

import torch

T = TypeVar("T")

_QUIET_SECONDS = 5.0  # what ends sooner needs no sign of life


class ProcessError(RuntimeError):
    """A process ended without a result."""


class Progress:
    """Signs of life on `stream` from work of `total` parts.

    On a terminal one line that is renewed every second and disappears in the end; elsewhere a line after 5 seconds,
    10, 20 and so on.
    """

    def __init__(self, what: str, total: int, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._total, self._stream, self._clock = what, total, stream, clock
        self._started = clock()
        self._terminal = stream.isatty()
        self._next = 1.0 if self._terminal else _QUIET_SECONDS
        self._width = 0

    def tell(self, done: int) -> None:
        """Says that so many parts are `done`, if it is time to."""
        seconds = self._clock() - self._started
        if seconds < self._next:
            return
        self._next = seconds + 1 if self._terminal else 2 * self._next
        line = f"{self._what}: {done} of {self._total} done after {seconds:.0f} s"
        self._width = max(self._width, len(line))
        self._stream.write(f"\r{line:<{self._width}}" if self._terminal else f"{line}\n")
        self._stream.flush()

    def end(self) -> None:
        """Wipes the line from a terminal."""
        if self._terminal and self._width:
            self._stream.write(f"\r{'':<{self._width}}\r")
            self._stream.flush()


def in_processes(function: Callable[..., T], tasks: Sequence[tuple[Any, ...]], what: str = "working") -> list[T]:
    """`function(*task)` for each task, in their order; as many at a time as there are processors.

    Results and errors must be picklable. Whatever a call raises is raised here. `what` names the work to the user,
    who is told of its progress on stderr.

    Raises:
        ProcessError: if a process is killed.
    """
    torch.set_num_threads(1)  # a fork after an operation with more threads may hang
    context = multiprocessing.get_context("fork")
    results: list[T | None] = [None] * len(tasks)
    left = list(reversed(list(enumerate(tasks))))
    running: dict[Connection, tuple[int, Any]] = {}
    progress = Progress(what, len(tasks), sys.stderr)
    try:
        while left or running:
            while left and len(running) < (os.cpu_count() or 1):
                index, task = left.pop()
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_send_result, args=(there, function, task), daemon=True)
                process.start()
                there.close()
                running[here] = index, process
            for ready in wait(list(running), timeout=1.0):
                index, process = running.pop(cast(Connection, ready))
                results[index] = _received(cast(Connection, ready), process)
            progress.tell(len(tasks) - len(left) - len(running))
    finally:
        progress.end()
        for _, process in running.values():
            process.kill()
    return cast(list[T], results)


def _send_result(there: Connection, function: Callable[..., Any], task: tuple[Any, ...]) -> None:
    try:
        there.send((function(*task), None))
    except Exception as error:
        there.send((None, error))


def _received(connection: Connection, process: Any) -> Any:
    try:
        result, error = connection.recv()
    except EOFError:
        process.join()
        raise ProcessError(
            f"A helper process of titan-train ended with exit code {process.exitcode} and no result, perhaps for lack "
            "of memory; start it where more is free."
        ) from None
    process.join()
    if error is not None:
        raise error
    return result
