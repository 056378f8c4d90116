"""Who is missing in which collective: PyTorch's Flight Recorder, written down by each rank and read side by side.

The Flight Recorder is a ring buffer of the collectives that a process has called, 2,000 of them unless
`TORCH_FR_BUFFER_SIZE` says otherwise (0: off); NCCL's and gloo's have the same form. It is on by default and costs next
to nothing. NCCL, but not gloo, records messages from rank to rank as well.

A rank that waits has a collective under way. The other ranks of its process group have called it too, or have not:
those are the ones to look at. Collectives are numbered within their group, so that ranks can be compared by number.
"""

import io
import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_RECORDS = re.compile(r"collectives-rank-(\d+)-step-\d+\.json|nccl-rank-(\d+)")


@dataclass(frozen=True)
class Call:
    """A collective that a rank has called."""

    group: str
    """The name of the process group."""
    description: str
    """What the group is for, as its maker has said, for example the name of a mesh axis."""
    number: int
    """Counted from 1 within the group."""
    operation: str
    """For example `gloo:all_reduce`."""
    shapes: str
    """Of the tensors that go in, with their dtypes."""
    under_way: bool
    """Whether the rank still waits for it."""


@dataclass(frozen=True)
class Record:
    """What one rank's Flight Recorder held."""

    rank: int
    calls: tuple[Call, ...]
    """Oldest first."""
    groups: Mapping[str, tuple[int, ...]]
    """Name of each group of the rank -> the global ranks in it."""


@dataclass(frozen=True)
class Stuck:
    """A collective in which ranks wait for others."""

    call: Call
    waiting: tuple[int, ...]
    """The ranks that have called it and wait."""
    missing: tuple[int, ...]
    """The ranks of the group that have not called it, or of which there is no record."""

    def __str__(self) -> str:
        group = f"group {self.call.group}" + (f" ({self.call.description})" if self.call.description else "")
        waiting, missing = _ranks(self.waiting), _ranks(self.missing)
        wait = "waits" if len(self.waiting) == 1 else "wait"
        where = f"{self.call.operation} number {self.call.number} of {group}, of {self.call.shapes}"
        return f"{waiting} {wait} in {where}; not there: {missing if self.missing else 'nobody, all have called it'}"


def leave_nccl_dumps(folder: Path) -> None:
    """Asks NCCL to leave its record in `folder` when a collective times out; to be called before a group is made."""
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "nccl-rank-"))


def write_record(path: Path, rank: int) -> Record | None:
    """Writes what this process's Flight Recorder holds, as JSON; returns it, None if there is nothing."""
    from titan_metrics.compat import collective_records, group_ranks

    records = collective_records()
    if records is None:
        return None
    records["titan"] = {"rank": rank, "groups": group_ranks()}
    partial = path.with_name(f"{path.name}.partial")  # other ranks read it
    partial.write_text(json.dumps(records))
    partial.replace(path)
    return _record(rank, records)


def read_records(folder: Path, since: float = 0.0) -> list[Record]:
    """The newest record of each rank in a folder, those that NCCL has left included.

    `since`: when the oldest of interest was written, in seconds since the Unix epoch.
    """
    newest: dict[int, Path] = {}
    written = {path: path.stat().st_mtime for path in folder.iterdir()}
    for path in sorted(written, key=lambda path: written[path]):
        if written[path] >= since and (found := _RECORDS.fullmatch(path.name)):
            newest[int(found[1] or found[2])] = path
    records = []
    for rank, path in sorted(newest.items()):
        content = path.read_bytes()
        loaded = json.loads(content) if path.suffix == ".json" else _Plain(io.BytesIO(content)).load()
        records.append(_record(rank, loaded))
    return records


def find_stuck(records: Iterable[Record], alive: Iterable[int] | None = None) -> list[Stuck]:
    """The collectives in which ranks wait, the one that most ranks are missing in first.

    Args:
        records: of as many ranks as there are.
        alive: ranks that run; of theirs a record that is not there yet says nothing. None: only those with a record.
    """
    records = list(records)
    by_rank = {record.rank: record for record in records}
    silent_but_alive = set(alive or ()) - by_rank.keys()
    stuck: dict[tuple[str, int], Stuck] = {}
    for record in records:
        for call in record.calls:
            key = (call.group, call.number)
            if not call.under_way or key in stuck:
                continue
            members = record.groups.get(call.group, ())
            waiting = tuple(rank for rank in members if rank in by_rank and _waits(by_rank[rank], call))
            missing = tuple(
                rank
                for rank in members
                if rank not in silent_but_alive and (rank not in by_rank or not _has_called(by_rank[rank], call))
            )
            stuck[key] = Stuck(call, waiting or (record.rank,), missing)
    return sorted(stuck.values(), key=lambda found: (-len(found.missing), found.call.number))


def _has_called(record: Record, call: Call) -> bool:
    return any(known.group == call.group and known.number >= call.number for known in record.calls)


def _waits(record: Record, call: Call) -> bool:
    return any((known.group, known.number) == (call.group, call.number) and known.under_way for known in record.calls)


def _record(rank: int, records: Mapping[str, Any]) -> Record:
    groups = records.get("titan", {}).get("groups")
    if groups is None:  # a record that NCCL wrote itself
        groups = {config["name"]: json.loads(config["ranks"]) for config in records["pg_config"].values()}
    calls = tuple(_call(entry) for entry in records["entries"] if not entry["is_p2p"])
    return Record(rank, calls, {name: tuple(ranks) for name, ranks in groups.items()})


def _call(entry: Mapping[str, Any]) -> Call:
    name, description = entry["process_group"]
    shapes = ", ".join(
        f"{dtype.lower()} {size}" for dtype, size in zip(entry["input_dtypes"], entry["input_sizes"], strict=False)
    )
    return Call(
        group=name,
        description="" if description == "undefined" else description,
        number=entry["collective_seq_id"],
        operation=entry["profiling_name"],
        shapes=shapes or "nothing",
        under_way=not entry["retired"] and entry["state"] != "completed",
    )


def _ranks(ranks: Iterable[int]) -> str:
    ranks = list(ranks)
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


class _Plain(pickle.Unpickler):
    """Reads containers, strings and numbers, and refuses whatever could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"A record of collectives has no business with {module}.{name}.")
