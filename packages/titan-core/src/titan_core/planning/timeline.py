"""When each rank of a pipeline computes what, and how long it waits: the schedule's own order, played with a clock.

A unit of time is one stage's forward of a micro-batch. A backward takes two: one for the gradients of activations, one
for those of weights, which some schedules compute apart. Sending takes no time, and all stages take equally long.
Imports no torch.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

Computation = tuple[int, str, int]
"""Stage, what it computes (`F` forward, `B` backward or its parts: `I` of activations, `W` of weights), micro-batch."""

_UNITS = {"F": 1, "B": 2, "I": 1, "W": 1}


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One computation on one rank."""

    computation: Computation
    """What is computed."""
    start: int
    """Units of time since the step began."""
    end: int
    """When it is done, in the same units."""


@dataclass(frozen=True)
class Timeline:
    """A step of a pipeline: the computations of each rank, in order."""

    ranks: tuple[tuple[Slot, ...], ...]

    @property
    def duration(self) -> int:
        """Units of time until the last rank is done."""
        return max(slots[-1].end for slots in self.ranks)

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they wait, 0 to 1."""
        busy = sum(slot.end - slot.start for slots in self.ranks for slot in slots)
        return 1 - busy / (self.duration * len(self.ranks))


class DeadlockError(ValueError):
    """Ranks of a pipeline wait for each other for ever; `waiting`: rank -> what it cannot begin, what that needs."""

    def __init__(self, waiting: Mapping[int, tuple[Computation, Computation]]) -> None:
        self.waiting = waiting
        listed = "; ".join(
            f"pp rank {rank} at {label(action)} for {label(need)}" for rank, (action, need) in waiting.items()
        )
        super().__init__(f"The pipeline's schedule never ends: {listed}. Mend the order of its actions.")


def play(order: Mapping[int, Sequence[Computation]]) -> Timeline:
    """Starts each computation as soon as its rank is free and what it needs is there.

    Raises:
        DeadlockError: if ranks wait for each other for ever.
    """
    last = max(stage for actions in order.values() for stage, _, _ in actions)
    planned = {action for actions in order.values() for action in actions}
    done: dict[Computation, int] = {}
    slots: dict[int, list[Slot]] = {rank: [] for rank in sorted(order)}
    left = {rank: list(reversed(actions)) for rank, actions in order.items()}

    def needs(action: Computation) -> list[Computation]:
        return _needs(action, last, planned)

    while any(left.values()):
        moved = False
        for rank, actions in left.items():
            while actions and all(need in done for need in needs(actions[-1])):
                action = actions.pop()
                free = slots[rank][-1].end if slots[rank] else 0
                start = max([free, *(done[need] for need in needs(action))])
                slots[rank].append(Slot(computation=action, start=start, end=start + _UNITS[action[1]]))
                done[action] = slots[rank][-1].end
                moved = True
        if not moved:
            stuck = {rank: actions[-1] for rank, actions in left.items() if actions}
            raise DeadlockError(
                {rank: (at, next(need for need in needs(at) if need not in done)) for rank, at in stuck.items()}
            )
    return Timeline(tuple(tuple(own) for own in slots.values()))


def _needs(action: Computation, last: int, planned: Set[Computation]) -> list[Computation]:
    stage, kind, micro_batch = action
    if kind == "F":
        return [(stage - 1, "F", micro_batch)] if stage else []
    if kind == "W":
        return [(stage, "I", micro_batch)]
    if stage == last:
        return [(stage, "F", micro_batch)]
    # The next stage may compute its backward whole or in parts.
    parts = (stage + 1, "I", micro_batch)
    return [(stage, "F", micro_batch), parts if parts in planned else (stage + 1, "B", micro_batch)]


def most_in_flight(actions: Sequence[Computation], weights: Mapping[int, float]) -> float:
    """The most activations that a rank keeps at one time: micro-batches, each times the weight of its stage.

    A micro-batch is kept from its forward to the end of its backward.
    """
    kept = most = 0.0
    whole = {action[::2] for action in actions if action[1] == "W"}
    for stage, kind, micro_batch in actions:
        if kind == "F":
            kept += weights[stage]
        elif kind in "BW" or (stage, micro_batch) not in whole:
            kept -= weights[stage]
        most = max(most, kept)
    return most


def draw(timeline: Timeline, width: int = 120) -> list[str]:
    """One line a pipeline rank, time to the right: `1F3` is the forward of micro-batch 3 on stage 1, dots are waiting.

    Where each rank has one stage, its number is left out. What is beyond `width` characters is cut.
    """
    single = all(len({slot.computation[0] for slot in slots}) == 1 for slots in timeline.ranks)
    labels = {slot.computation: label(slot.computation, single=single) for slots in timeline.ranks for slot in slots}
    cell = 1 + max(map(len, labels.values()))
    head = len(f"pp rank {len(timeline.ranks) - 1} ")
    columns = max(1, (width - head) // cell)
    lines = []
    for rank, slots in enumerate(timeline.ranks):
        row: list[str] = ["." * (cell - 1)] * timeline.duration
        for slot in slots:
            for i in range(slot.start, slot.end):
                row[i] = labels[slot.computation] if i == slot.start else "-" * (cell - 1)
        cells = "".join(text.ljust(cell) for text in row[:columns]).rstrip()
        lines.append(f"pp rank {rank}".ljust(head) + cells)
    if columns < timeline.duration:
        lines.append(f"... the first {columns} of {timeline.duration} units of time")
    return lines


def label(action: Computation, *, single: bool = False) -> str:
    """An action as it stands in a schedule's file, such as `1F3`; without its stage if each rank has a `single` one."""
    stage, kind, micro_batch = action
    return f"{kind}{micro_batch}" if single else f"{stage}{kind}{micro_batch}"
