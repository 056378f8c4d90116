"""Runs a function on many arguments, each in a forked process of its own that has everything imported already."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

import torch

T = TypeVar("T")


class ProcessError(RuntimeError):
    """A process ended without a result."""


def in_processes(function: Callable[..., T], tasks: Sequence[tuple[Any, ...]]) -> list[T]:
    """`function(*task)` for each task, in their order; as many at a time as there are processors.

    Results and errors must be picklable. Whatever a call raises is raised here.

    Raises:
        ProcessError: if a process is killed.
    """
    torch.set_num_threads(1)  # a fork after an operation with more threads may hang
    context = multiprocessing.get_context("fork")
    results: list[T | None] = [None] * len(tasks)
    left = list(reversed(list(enumerate(tasks))))
    running: dict[Connection, tuple[int, Any]] = {}
    try:
        while left or running:
            while left and len(running) < (os.cpu_count() or 1):
                index, task = left.pop()
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_send_result, args=(there, function, task), daemon=True)
                process.start()
                there.close()
                running[here] = index, process
            for ready in wait(list(running)):
                index, process = running.pop(cast(Connection, ready))
                results[index] = _received(cast(Connection, ready), process)
    finally:
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
