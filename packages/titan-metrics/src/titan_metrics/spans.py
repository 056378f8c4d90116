"""Which phase of a step takes how long, on each rank: `with spans.span("forward_backward"): ...`.

One `Spans` belongs to a process. It adds up the time of the outermost spans, which `read` gives as the shares of an
interval, and writes every span to a file of the rank, which `titan_metrics.trace` turns into a timeline and
`titan_metrics.stragglers` into the name of the slow rank. Times are the host's: a GPU's work is seen where the host
waits for it.

A span costs a microsecond or two. It goes to a queue, which a thread writes in whole lines every now and then; a killed
process loses what it did since.

The file is JSONL. Each start of a process begins with

    {"start": seconds since the Unix epoch, "rank": …, "host": …, "process": …, "world_size": …, "clock_offset": …}

where `clock_offset` is how many seconds this host's clock is ahead of rank 0's, or null, and then has

    {"name": …, "step": …, "at": seconds since the start, "seconds": …, "depth": 0 for an outermost span, …}

with whatever attributes the caller gave, `waited`: the seconds of the span spent waiting for other ranks (if any), and
`thread`: the name of the thread, if it is not the one that made the `Spans`.
"""

import contextlib
import functools
import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

_log = logging.getLogger(__name__)

_Row = tuple[str, int | None, float, float, int, dict[str, object] | None]


class Spans:
    """Times the phases of this process's steps and, if it has a `path`, writes each of them down.

    A file that cannot be opened or written costs one warning, and never the run.

    Args:
        path: the rank's file; its folder is made if missing. None: only the sums for `read`.
        rank: of this process.
        world_size: how many processes train together.
        clock_offset: how many seconds this host's clock is ahead of rank 0's, None if unknown (`measure_clock_offset`).
        flush_seconds: how long a span may stay in memory.
        clock: seconds from any fixed point, never going back.
    """

    step: int | None = None
    """The step that spans belong to from now on, counted from 1."""

    def __init__(
        self,
        path: Path | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        clock_offset: float | None = None,
        flush_seconds: float = 1.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._thread = threading.get_ident()
        self._stacks: dict[int, list[_Span]] = {self._thread: []}
        self._seconds: dict[str, float] = {}
        self._origin = self._opened = clock()
        self._rows: deque[_Row] = deque()
        self._file: IO[str] | None = None
        self._writing = threading.Lock()
        self._closed = threading.Event()
        if path is None:
            return
        header = {
            "start": time.time(),
            "rank": rank,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "world_size": world_size,
            "clock_offset": clock_offset,
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_jsonl(path)
            self._file.write(json.dumps(header) + "\n")
            self._file.flush()
        except OSError as error:
            self._give_up(f"Spans are not written in this run: {error}")
            return
        self._flusher = threading.Thread(target=self._keep_flushing, args=(flush_seconds,), name="spans", daemon=True)
        self._flusher.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def span(self, name: str, **attributes: object) -> "_Span":
        """A phase that lasts as long as the `with` statement it opens; phases may nest.

        `attributes` are written beside it and must be JSON.
        """
        return _Span(self, name, attributes)

    def record(self, name: str, start: float, end: float, **attributes: object) -> None:
        """Writes down a phase that lay between two readings of the clock (`time.perf_counter`), inside what is open."""
        depth = len(self._stacks.get(threading.get_ident(), ()))
        self._add(name, start, end, depth, attributes)

    def action(self, name: str, stage: int, micro_batch: int, start: float, end: float) -> None:
        """Writes down what a pipeline stage did for one micro-batch, as `record` does: for a schedule's callback."""
        self.record(name, start, end, stage=stage, micro_batch=micro_batch)

    def wait(self, seconds: float) -> None:
        """Says that this thread has waited so long for other ranks; every span that is open counts it."""
        for span in self._stacks.get(threading.get_ident(), ()):
            span.waited += seconds

    def open(self) -> list[str]:
        """The names of the phases that the thread which made this is in, outermost first."""
        return [span.name for span in tuple(self._stacks[self._thread])]

    def read(self) -> dict[str, float]:
        """The seconds since the last reading by outermost phase: `time.NAME`, and `time.other` for what no span covers.

        Empty if there was no span.
        """
        now = self._clock()
        seconds, self._seconds = self._seconds, {}
        interval, self._opened = now - self._opened, now
        if not seconds:
            return {}
        other = max(interval - sum(seconds.values()), 0.0)
        return {f"time.{name}": value for name, value in seconds.items()} | {"time.other": other}

    def flush(self) -> None:
        """Hands all finished spans to the operating system; from any thread."""
        with self._writing:
            if self._file is None:
                self._rows.clear()
                return
            lines = []
            while self._rows:
                lines.append(_line(self._rows.popleft(), self._origin))
            try:
                self._file.write("".join(lines))
                self._file.flush()
            except (OSError, ValueError) as error:
                self._give_up(f"Spans are no longer written in this run: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Writes what is left and closes the file; spans may still be opened, and are only added up."""
        self._closed.set()
        if self._file is not None:
            self._flusher.join()
        self.flush()
        with self._writing:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _give_up(self, why: str) -> None:
        _log.warning(why)
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def _keep_flushing(self, every: float) -> None:
        while not self._closed.wait(every):
            self.flush()

    def _enter(self, span: "_Span") -> None:
        thread = threading.get_ident()
        stack = self._stacks.get(thread)
        if stack is None:
            stack = self._stacks.setdefault(thread, [])
        stack.append(span)

    def _exit(self, span: "_Span", start: float, end: float) -> None:
        stack = self._stacks[threading.get_ident()]
        stack.remove(span)
        if span.waited:
            span.attributes["waited"] = round(span.waited, 9)
        self._add(span.name, start, end, len(stack), span.attributes)

    def _add(self, name: str, start: float, end: float, depth: int, attributes: dict[str, object]) -> None:
        if threading.get_ident() != self._thread:
            attributes["thread"] = threading.current_thread().name
        elif depth == 0:
            self._seconds[name] = self._seconds.get(name, 0.0) + end - start
        if self._file is not None:
            self._rows.append((name, self.step, start, end, depth, attributes or None))


class _Span:
    """One phase under way."""

    __slots__ = ("_spans", "_start", "attributes", "name", "waited")

    def __init__(self, spans: Spans, name: str, attributes: dict[str, object]) -> None:
        self._spans = spans
        self._start = 0.0
        self.name = name
        self.attributes = attributes
        self.waited = 0.0

    def __enter__(self) -> Self:
        self._spans._enter(self)
        self._start = self._spans._clock()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._spans._exit(self, self._start, self._spans._clock())


def open_jsonl(path: Path) -> IO[str]:
    """A file of lines to append to, whose last line is whole: one that a killed process has torn gets its end."""
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
    return path.open("a", encoding="utf-8")


def _line(row: _Row, origin: float) -> str:
    name, step, start, end, depth, attributes = row
    more = _encode(attributes) if attributes else ""
    return (
        f'{{"name": {_quoted(name)}, "step": {"null" if step is None else step}, "at": {start - origin:.6f}, '
        f'"seconds": {end - start:.9f}, "depth": {depth}{more}}}\n'
    )


def _encode(attributes: Mapping[str, object]) -> str:
    return ", " + json.dumps(attributes, default=str)[1:-1]


@functools.lru_cache(maxsize=1024)
def _quoted(name: str) -> str:
    return json.dumps(name)
