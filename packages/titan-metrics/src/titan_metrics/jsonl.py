"""Metrics as one JSON object a line: the run's own record, which other tools and the next start read.

A line is complete or absent for a reader that ignores a torn last line: each is handed to the operating system in
one piece as soon as it is logged, so killing the process loses nothing (a power cut may lose the last lines).

JSON has no word for NaN and the infinities, and a metric may be any of them just when it matters most. They are
written as the strings "NaN", "Infinity" and "-Infinity" (as protobuf's JSON mapping does), which Python's `float()`
reads back.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_NON_FINITE = {math.inf: "Infinity", -math.inf: "-Infinity"}


class DamagedFileError(RuntimeError):
    """A line of a file is not what its writer wrote; the message names both."""


class JsonlSink:
    """Appends each logged step to a file as one line of JSON, `step` first, floats with all their digits.

    Assumes that it is the file's only writer and that the file ends at a line's end (`resume_jsonl` sees to both a
    torn line and lines of steps that are about to be redone).

    Args:
        path: the file.
        clock: seconds since the Unix epoch, for a `time` in each line; None leaves it out.
    """

    def __init__(self, path: Path, clock: Callable[[], float] | None = None) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._clock = clock

    def log(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Writes one line and hands it to the operating system."""
        when = {} if self._clock is None else {"time": self._clock()}
        self._file.write(encode({"step": step, **when, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that may be in the middle of being written; none if there is no file.

    A line that a killed process has left unfinished is left out: the last one, or one before that with which the next
    process begins.

    Raises:
        DamagedFileError: if another line is no JSON object.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        yield from whole_lines(file, path)


def whole_lines(lines: Iterable[bytes], path: Path, number: int = 0) -> Iterator[dict[str, Any]]:
    """As `read_jsonl`, the objects in `lines`, which follow line `number` of the file at `path`."""
    unfinished: DamagedFileError | None = None
    for line in lines:
        if not line.endswith(b"\n"):
            return
        number += 1
        try:
            record = parse_line(line, path, number)
        except DamagedFileError as error:
            unfinished = unfinished or error
            continue
        if unfinished is not None and not _begins_a_process(record):
            raise unfinished
        unfinished = None
        yield record


def parse_line(line: bytes, path: Path, number: int | None) -> dict[str, Any]:
    """The object in one line of the file at `path`; `number` counts from 1, None if it is not known.

    Raises:
        DamagedFileError: if it is no JSON object.
    """
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if isinstance(record, dict):
        return record
    where = f"line {number}" if number is not None else "a line near its end"
    begin = line[:60].decode(errors="replace").strip()
    raise DamagedFileError(
        f"{path}, {where}, is not a JSON object: it begins {begin!r}. The file is damaged, or another program has "
        "written to it; remove that line, or move the file away."
    )


def _begins_a_process(record: Mapping[str, Any]) -> bool:
    return "start" in record or record.get("event") == "start"


def resume_jsonl(path: Path, step: int) -> int:
    """Moves the lines after `step`, which a resumed run will write again, to `<name>.redone.jsonl` beside `path`.

    Lines that are no JSON object with an integer `step`, such as a torn last one, move too. However often this is
    interrupted, every line is in one of the two files: the new contents of each are published by renaming, the
    redone file first, and a block that an interrupted call already moved is recognized and not moved twice.

    Returns:
        How many lines moved.
    """
    if not path.exists():
        return 0
    kept, moved = [], []
    with path.open("rb") as file:
        for line in file:
            stays = line.endswith(b"\n") and _step_of(line) <= step
            (kept if stays else moved).append(line)
    if not moved:
        return 0
    if not moved[-1].endswith(b"\n"):
        moved[-1] += b"\n"
    redone = path.with_name(f"{path.stem}.redone.jsonl")
    before = redone.read_bytes() if redone.exists() else b""
    block = b"".join(moved)
    if not before.endswith(block):
        _replace(redone, [before, block])
    _replace(path, kept)
    return len(moved)


def encode(record: Mapping[str, object]) -> str:
    """One line of JSON, without its end."""
    try:
        return _ENCODER.encode(record)
    except ValueError:  # a value is not finite: rare, so that the usual line pays nothing for it
        return _ENCODER.encode({key: _finite(value) for key, value in record.items()})


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return _NON_FINITE.get(value, "NaN")
    return value


def _step_of(line: bytes) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def _replace(path: Path, parts: Iterable[bytes]) -> None:
    """Publishes a file's new contents in one step, on disk before its name is."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
