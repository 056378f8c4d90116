"""A pipeline schedule from a CSV file: one line a rank, one cell an action, in the order in which the rank does them.

An action is the number of a stage, a letter and the number of a micro-batch: F forward, B backward, or I and W for the
gradients of activations and of weights apart; empty cells wait. Imports no torch.

Each forward comes before its own backward, and `I` before `W`; ranks must not wait for each other for ever. One rule is
that of torch's runtime, which counts losses instead of numbering them: the last stage's forwards are in order.
"""

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_core.planning.timeline import Computation, DeadlockError, label, play

_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")


@dataclass(frozen=True)
class ScheduleFile:
    """What such a file says."""

    path: str
    rows: tuple[tuple[Computation, ...], ...]
    """For each rank its actions."""

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
            lines = "1 line" if len(self.rows) == 1 else f"{len(self.rows)} lines"
            return [f"{self.path} has {lines}, but parallel.pp is {pp}; write one line for each rank."]
        held = [{stage for stage, _, _ in row} for row in self.rows]
        if sorted(stage for own in held for stage in own) != list(range(stages)):
            return [
                f"{self.path} has the stages {[sorted(own) for own in held]} on its lines; {stages} stages need "
                f"each of 0 to {stages - 1} on one line. Mend the file, or set parallel.pp_stages_per_rank."
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
        return self._order_problems(stages - 1) or self._deadlock_problems()

    def _order_problems(self, last: int) -> list[str]:
        """The first action of each line that its rank cannot do, whatever the others do; `last`: the last stage."""
        found = []
        for line, row in enumerate(self.rows, start=1):
            wrong = next(itertools.chain(_too_early(row), _out_of_order(row, last)), None)
            if wrong is not None:
                action, other, rule = wrong
                found.append(
                    f"{self.path}, line {line}: {label(action)} stands before {label(other)}, but {rule}; change their "
                    "order."
                )
        return found

    def _deadlock_problems(self) -> list[str]:
        """Why ranks would wait for each other for ever."""
        try:
            play(dict(enumerate(self.rows)))
        except DeadlockError as error:
            lines = {action: line for line, row in enumerate(self.rows, start=1) for action in row}
            listed = ", ".join(
                f"line {rank + 1} at {label(action)} for {label(need)} of line {lines[need]}"
                for rank, (action, need) in error.waiting.items()
            )
            return [
                f"{self.path} never ends, because ranks wait for each other: {listed}. A forward needs that of the "
                "stage before, a backward that of the stage after; change the order."
            ]
        return []


_BEFORE = {
    "B": ("F", "a forward comes before its backward"),
    "I": ("F", "a forward comes before its backward"),
    "W": ("I", "the gradients of activations (I) come before those of weights (W)"),
}

Misplaced = tuple[Computation, Computation, str]
"""An action, one that must not come after it but does, and the rule."""


def _too_early(row: Sequence[Computation]) -> Iterator[Misplaced]:
    place = {action: i for i, action in enumerate(row)}
    for stage, kind, micro_batch in row:
        if kind in _BEFORE:
            other, rule = _BEFORE[kind]
            needed = stage, other, micro_batch
            if place[needed] > place[stage, kind, micro_batch]:
                yield (stage, kind, micro_batch), needed, rule


def _out_of_order(row: Sequence[Computation], last: int) -> Iterator[Misplaced]:
    forwards = [action for action in row if action[:2] == (last, "F")]
    for first, second in itertools.pairwise(forwards):
        if first[2] > second[2]:
            yield first, second, "torch runs the forwards of the last stage in the order of their micro-batches only"


def read_schedule(path: str) -> ScheduleFile:
    """The schedule in the file at `path`.

    Raises:
        ValueError: if it cannot be read, or a cell is no action.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
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
    while rows and not rows[-1]:  # blank lines at the end
        rows.pop()
    return ScheduleFile(path, tuple(rows))
