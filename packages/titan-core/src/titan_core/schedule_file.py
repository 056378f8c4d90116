"""A pipeline schedule from a CSV file: one line a rank, one cell an action, in the order in which the rank does them.

An action is the number of a stage, a letter and the number of a micro-batch: F forward, B backward, or I and W for the
gradients of activations and of weights apart; empty cells wait. Imports no torch.
"""

import csv
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")


@dataclass(frozen=True)
class ScheduleFile:
    """What such a file says."""

    path: str
    rows: tuple[tuple[tuple[int, str, int], ...], ...]
    """For each rank its actions: stage, letter, micro-batch."""

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of weights are computed apart from those of activations."""
        return any(kind in "IW" for row in self.rows for _, kind, _ in row)

    def ranks(self) -> dict[int, int]:
        """Stage -> the rank that runs it."""
        return {stage: rank for rank, row in enumerate(self.rows) for stage, _, _ in row}

    def problems(self, *, pp: int, stages: int, micro_batches: int) -> list[str]:
        """Why it cannot run `stages` stages on `pp` ranks for so many micro-batches; empty if it can."""
        if len(self.rows) != pp:
            return [f"{self.path} has {len(self.rows)} lines, but parallel.pp is {pp}; write one line for each rank."]
        held = [{stage for stage, _, _ in row} for row in self.rows]
        if sorted(stage for own in held for stage in own) != list(range(stages)):
            return [
                f"{self.path} has the stages {[sorted(own) for own in held]} on its lines; {stages} stages need "
                f"each of "
                f"0 to {stages - 1} on one line. Mend the file, or set parallel.pp_stages_per_rank."
            ]
        done = Counter(action for row in self.rows for action in row)
        found = []
        for stage in range(stages):
            for i in range(micro_batches):
                forward, whole, inputs, weights = (done[stage, kind, i] for kind in "FBIW")
                if forward != 1 or (whole, inputs, weights) not in ((1, 0, 0), (0, 1, 1)):
                    found.append(f"{stage}F{i}, and {stage}B{i} or both {stage}I{i} and {stage}W{i}")
        if found:
            return [f"{self.path} must have once each {found[0]}; {len(found)} such are missing or doubled."]
        if sum(done.values()) != sum(
            done[s, k, i] for s in range(stages) for i in range(micro_batches) for k in "FBIW"
        ):
            return [
                f"{self.path} has micro-batches beyond the {micro_batches} that a rank computes a step; change it, "
                "training.micro_batch_size or training.global_batch_size."
            ]
        return []


def read_schedule(path: str) -> ScheduleFile:
    """The schedule in the file at `path`.

    Raises:
        ValueError: if it cannot be read, or a cell is no action.
    """
    try:
        with Path(path).open(newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"parallel.pp_schedule_csv {path} cannot be read: {error}. Give the path of a CSV file."
        ) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        actions = []
        for cell in filter(None, (cell.strip() for cell in line)):
            match = _ACTION.fullmatch(cell)
            if match is None:
                raise ValueError(f"{path}: {cell[:40]!r} in line {number} is no action; write actions such as 0F0.")
            actions.append((int(match[1]), match[2], int(match[3])))
        rows.append(tuple(actions))
    return ScheduleFile(path, tuple(rows))
