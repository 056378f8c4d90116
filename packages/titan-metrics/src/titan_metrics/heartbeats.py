"""A small file for each rank that says when it was last alive, so that survivors can name one that is not.

A rank that was killed or stopped, or whose machine is gone, stops writing; a rank that merely waits does not. The files
lie in a folder that all ranks must see.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Heartbeat:
    """The last sign of life of a rank."""

    rank: int
    host: str
    process: int
    step: int
    """The last step that it has ended."""
    time: float
    """Seconds since the Unix epoch, on its own clock."""


def write_heartbeat(folder: Path, rank: int, step: int) -> None:
    """Says that this process, rank `rank`, is alive and has ended `step`."""
    beat = Heartbeat(rank, socket.gethostname(), os.getpid(), step, time.time())
    partial = folder / f"rank-{rank}.partial"
    partial.write_text(json.dumps(asdict(beat)))
    partial.replace(_path(folder, rank))


def remove_heartbeat(folder: Path, rank: int) -> None:
    """Takes the file away: a rank that has ended is not missed."""
    _path(folder, rank).unlink(missing_ok=True)


def read_heartbeats(folder: Path) -> dict[int, Heartbeat]:
    """The last sign of life of each rank."""
    beats = {}
    for path in sorted(folder.glob("rank-*.json")):
        with contextlib.suppress(FileNotFoundError):  # a rank has ended just now
            beat = Heartbeat(**json.loads(path.read_bytes()))
            beats[beat.rank] = beat
    return beats


def find_dead(beats: Mapping[int, Heartbeat], now: float, after_seconds: float) -> list[Heartbeat]:
    """The ranks whose last sign of life is older than that; clocks of hosts may differ by less than it."""
    return [beat for beat in beats.values() if now - beat.time > after_seconds]


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"
