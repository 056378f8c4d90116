"""The spans of a run's ranks for a few steps: what each rank did when, and which rank was slow in what.

A rank's file may be gigabytes long. For the latest steps only its end is read, and the line of the process's start
that goes with it; for steps that the user names, all of it is.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import IO, Any

from titan_metrics.jsonl import DamagedFileError, parse_line
from titan_metrics.report.files import JsonLines, ReportError, damaged, unreadable
from titan_metrics.stragglers import Phase, Straggler, find_stragglers
from titan_metrics.trace import RecordedSpan, SpansError, current, newest_world_size, phases, recorded_spans

_READ_BYTES = 64 << 20  # of all ranks together
_RANK_BYTES = (256 << 10, 4 << 20)  # of one rank at least and at most, if its steps are long
_FIRST_BYTES = 64 << 10  # of one rank, before it is known how long its steps are
_CHUNK = 1 << 20
_LATEST_STEPS = 24  # that a rank's means are taken over
_START = b'{"start"'


class RunSpans:
    """Spans by rank, of the steps that every rank has; those of other threads than the training one are left out.

    A rank counts if the newest start has it: what ranks did that are gone is shown if only their steps are asked for.
    """

    def __init__(self, by_rank: dict[int, list[RecordedSpan]], *, recorded: bool) -> None:
        self.recorded = recorded
        """Whether there is a rank's file, of whatever steps."""
        steps = [{span.step for span in spans if span.step is not None} for spans in by_rank.values()]
        self.steps = sorted(set.intersection(*steps)) if steps else []
        shared = set(self.steps)
        self.by_rank = {rank: [span for span in by_rank[rank] if span.step in shared] for rank in sorted(by_rank)}
        busy = phases(span for spans in self.by_rank.values() for span in spans)
        self.means = _means(busy, list(self.by_rank))
        """Seconds a step, waits left out, that a rank takes for an outermost phase: phase -> rank -> median."""
        self.stragglers: list[Straggler] = find_stragglers(busy)

    @classmethod
    def read(cls, folder: Path, window: tuple[int, int] | None) -> "RunSpans":
        """The spans in `folder`: those of the steps in `window` (first and last), or the latest if it is None.

        Raises:
            ReportError: if a file cannot be read, or is no file of spans.
        """
        files = {path: path.stem.removeprefix("rank-") for path in folder.glob("rank-*.jsonl")}
        limit = min(max(_READ_BYTES // max(len(files), 1), _RANK_BYTES[0]), _RANK_BYTES[1])
        spans: list[RecordedSpan] = []
        for path, rank in files.items():
            if not rank.isdigit():
                raise ReportError(
                    f"{path} is not named rank-N.jsonl; move it out of {folder}, or name it for its rank."
                )
            spans += _latest(path, limit) if window is None else _of_window(path, window)
        ranks = range(newest_world_size(spans))
        by_rank: dict[int, list[RecordedSpan]] = {int(rank): [] for rank in files.values() if int(rank) in ranks}
        for span in current(spans):
            by_rank[span.process.rank].append(span)
        found = cls(by_rank, recorded=bool(files))
        return found if window is not None else cls(found.only(found.steps[-_LATEST_STEPS:]), recorded=bool(files))

    def only(self, steps: list[int]) -> dict[int, list[RecordedSpan]]:
        """The spans of these steps, by rank."""
        wanted = set(steps)
        return {rank: [span for span in spans if span.step in wanted] for rank, spans in self.by_rank.items()}

    def step_seconds(self, step: int) -> float:
        """From the first rank's first span of `step` to the last rank's end of it."""
        spans = [span for spans in self.by_rank.values() for span in spans if span.step == step]
        return max(span.start + span.seconds for span in spans) - min(span.start for span in spans)


def _means(busy: list[Phase], ranks: list[int]) -> dict[str, dict[int, float]]:
    by_phase: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for phase in busy:
        by_phase[phase.name][phase.rank].append(phase.seconds)
    return {
        name: {rank: median(by_rank[rank]) if by_rank[rank] else 0.0 for rank in ranks}
        for name, by_rank in by_phase.items()
    }


def _of_window(path: Path, window: tuple[int, int]) -> list[RecordedSpan]:
    spans = _recorded(JsonLines(path).new(), path)
    return [span for span in spans if span.step is not None and window[0] <= span.step <= window[1]]


def _latest(path: Path, limit: int) -> list[RecordedSpan]:
    """The spans of the latest steps, or of as many as lie in the last `limit` bytes."""
    size = min(_FIRST_BYTES, limit)
    while True:
        spans = list(_recorded(_end_of(path, size), path))
        if size >= path.stat().st_size:
            return spans
        whole = [span for span in spans if span.step != spans[0].step]  # the first step may lack its begin
        if size >= limit or len({span.step for span in whole}) >= _LATEST_STEPS:
            return whole
        size *= 4


def _recorded(records: Iterator[dict[str, Any]], path: Path) -> Iterator[RecordedSpan]:
    try:
        yield from (span for span in recorded_spans(records, path) if "thread" not in span.attributes)
    except SpansError as error:
        raise ReportError(str(error)) from error


def _end_of(path: Path, limit: int) -> Iterator[dict[str, Any]]:
    """The objects in the last `limit` bytes of the file, after that of the process that wrote them."""
    try:
        with path.open("rb") as file:
            begin = file.seek(0, os.SEEK_END) - limit
            if begin <= 0:
                yield from JsonLines(path).new()
                return
            yield from _start_before(file, begin, path)
            file.seek(begin)
            file.readline()  # the rest of a line
            torn = None
            for line in file:
                try:
                    value = parse_line(line, path, None)
                except DamagedFileError as error:  # the last line, or one that a killed process has left
                    torn = error
                    continue
                if torn is not None and "start" not in value:
                    raise torn
                torn = None
                yield value
    except DamagedFileError as error:
        raise damaged(error) from error
    except OSError as error:
        raise unreadable(path, error) from error


def _start_before(file: IO[bytes], position: int, path: Path) -> Iterator[dict[str, Any]]:
    """The last line before `position` with which a process began."""
    after = b""
    while position > 0:
        begin = max(position - _CHUNK, 0)
        file.seek(begin)
        block = file.read(position - begin)
        found = (block + after).rfind(_START)
        if found >= 0:
            file.seek(begin + found)
            yield parse_line(file.readline(), path, None)
            return
        after, position = block[: len(_START)], begin
