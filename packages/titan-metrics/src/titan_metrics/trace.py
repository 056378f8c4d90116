"""All ranks' spans on one timeline: reading them, and writing them for Perfetto (https://ui.perfetto.dev).

    titan-trace RUN                      # RUN/trace.json, and a summary of slow ranks
    titan-trace RUN --steps 100 120 --output trace.json

The file is in the Trace Event Format that Perfetto and chrome://tracing read ("Trace Event Format", Google, 2016): a
process for each rank, in it a track for the training thread, one for each pipeline stage and one for each other thread.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_metrics.jsonl import DamagedFileError, read_jsonl
from titan_metrics.stragglers import Phase, find_stragglers, summary


class SpansError(RuntimeError):
    """A run directory has no spans, or a line among them is none; the message says where."""


@dataclass(frozen=True)
class Process:
    """One start of one rank."""

    rank: int
    host: str
    number: int
    """The system's number of the process."""
    start: float
    """Seconds since the Unix epoch, on the clock of rank 0."""
    world_size: int
    """How many ranks were started together."""


@dataclass(frozen=True)
class RecordedSpan:
    """A phase as a rank has written it."""

    process: Process
    name: str
    step: int | None
    start: float
    """Seconds since the Unix epoch, on the clock of rank 0."""
    seconds: float
    depth: int
    attributes: dict[str, Any] = field(default_factory=dict)


_OWN = {"name", "step", "at", "seconds", "depth"}


def read_spans(run: Path, steps: range | None = None) -> Iterator[RecordedSpan]:
    """The spans of all ranks and starts of a run; only those of `steps` if given.

    Raises:
        SpansError: if there are none, or a line is none.
        DamagedFileError: if a line is no JSON object.
    """
    files = sorted((run / "spans").glob("rank-*.jsonl"))
    if not files:
        raise SpansError(
            f"{run} has no spans (no {run / 'spans'}/rank-N.jsonl). Train with spans enabled: with titan-train that "
            "is --spans.enabled."
        )
    for path in files:
        for span in recorded_spans(read_jsonl(path), path):
            if steps is None or span.step in steps:
                yield span


def recorded_spans(lines: Iterable[Mapping[str, Any]], path: Path) -> Iterator[RecordedSpan]:
    """The spans in the `lines` of one rank's file, which is at `path`; those before the first start are left out.

    Raises:
        SpansError: if a line is no span.
    """
    process: Process | None = None
    for line in lines:
        try:
            if "start" in line:
                process = _process(line)
                continue
            span = None if process is None else _span(process, line)
        except (KeyError, TypeError) as error:
            raise SpansError(
                f"{path} has a line that is no span ({error}): {str(line)[:80]}. Only titan_metrics.spans should write "
                "there; remove the line, or move the file away."
            ) from error
        if span is not None:
            yield span


def _process(line: Mapping[str, Any]) -> Process:
    start = line["start"] - (line.get("clock_offset") or 0.0)
    return Process(line["rank"], line["host"], line["process"], start, line["world_size"])


def _span(process: Process, line: Mapping[str, Any]) -> RecordedSpan:
    return RecordedSpan(
        process=process,
        name=line["name"],
        step=line["step"],
        start=process.start + line["at"],
        seconds=line["seconds"],
        depth=line["depth"],
        attributes={key: value for key, value in line.items() if key not in _OWN},
    )


def current(spans: Iterable[RecordedSpan]) -> list[RecordedSpan]:
    """Those that say how the run goes now: of ranks that the newest start has, and of a step its last time.

    A run that goes on with fewer ranks leaves the files of the others behind, and may do some of their steps again.
    """
    spans = list(spans)
    ranks = newest_world_size(spans)
    last = {(span.process.rank, span.step): span.process for span in spans}
    return [span for span in spans if span.process.rank < ranks and span.process == last[span.process.rank, span.step]]


def newest_world_size(spans: Iterable[RecordedSpan]) -> int:
    """How many ranks the newest of the starts that these spans are from has; 0 if there are no spans."""
    starts = ((span.process.start, span.process.world_size) for span in spans)
    return max(starts, default=(0.0, 0))[1]


def chrome_trace(spans: Iterable[RecordedSpan]) -> dict[str, Any]:
    """The spans as an object in the Trace Event Format; its times, in microseconds, begin with the first of them."""
    spans = sorted(spans, key=lambda span: span.start)
    origin = spans[0].start if spans else 0.0
    tracks: dict[tuple[int, str], int] = {}
    events: list[dict[str, Any]] = []
    for span in spans:
        rank, track = span.process.rank, _track(span)
        if not any(known == rank for known, _ in tracks):
            events.append(_name("process_name", rank, 0, f"rank {rank} ({span.process.host})"))
            events.append(_name("process_sort_index", rank, 0, rank))
        if (rank, track) not in tracks:
            tracks[rank, track] = len(tracks)
            events.append(_name("thread_name", rank, tracks[rank, track], track))
        events.append(
            {
                "name": span.name,
                "ph": "X",
                "ts": round((span.start - origin) * 1e6, 3),
                "dur": round(span.seconds * 1e6, 3),
                "pid": rank,
                "tid": tracks[rank, track],
                "args": {"step": span.step, **span.attributes},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _track(span: RecordedSpan) -> str:
    if "stage" in span.attributes:
        return f"stage {span.attributes['stage']}"
    return str(span.attributes.get("thread", "training"))


def _name(kind: str, rank: int, track: int, value: object) -> dict[str, Any]:
    key = "sort_index" if kind.endswith("sort_index") else "name"
    return {"name": kind, "ph": "M", "pid": rank, "tid": track, "args": {key: value}}


def phases(spans: Iterable[RecordedSpan]) -> list[Phase]:
    """What `stragglers` compares: how long each rank was busy in each outermost phase of each step, waits left out."""
    busy: dict[tuple[int, int, str], float] = {}
    for span in spans:
        if span.depth == 0 and span.step is not None and "thread" not in span.attributes:
            key = (span.process.rank, span.step, span.name)
            busy[key] = busy.get(key, 0.0) + span.seconds - span.attributes.get("waited", 0.0)
    return [Phase(*key, seconds=seconds) for key, seconds in busy.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `titan-trace`: 0 done, 1 not done (why, is on stderr), 2 the command line is wrong."""
    parser = argparse.ArgumentParser(prog="titan-trace", description="A run's spans as a timeline, and its slow ranks.")
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--output", type=Path, help="the trace to write (default: RUN/trace.json)")
    parser.add_argument("--steps", type=int, nargs=2, metavar=("FIRST", "LAST"), help="only these steps")
    parser.add_argument(
        "--threshold", type=float, default=0.1, help="share of the median step by which a slow rank is slower"
    )
    given = parser.parse_args(arguments)
    if given.steps and given.steps[0] > given.steps[1]:
        parser.error(f"--steps {given.steps[0]} {given.steps[1]}: the first step comes after the last.")
    steps = range(given.steps[0], given.steps[1] + 1) if given.steps else None
    output: Path = given.output or given.run / "trace.json"
    try:
        spans = list(read_spans(given.run, steps))
        if not spans and steps:
            raise SpansError(f"{given.run} has spans, but none of steps {steps[0]} to {steps[-1]}; name others.")
        output.write_text(json.dumps(chrome_trace(spans)))
    except (SpansError, DamagedFileError) as error:
        sys.stderr.write(f"titan-trace: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"titan-trace: Cannot write {output}: {error.strerror}. Name another file with --output.\n")
        return 1
    sys.stdout.write(f"{len(spans):,} spans in {output}; open it in https://ui.perfetto.dev.\n")
    sys.stdout.write(summary(find_stragglers(phases(current(spans)), share=given.threshold)) + "\n")
    return 0
