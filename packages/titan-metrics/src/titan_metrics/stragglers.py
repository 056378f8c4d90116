"""Which rank is slower than the others, in which phase, by how much.

For each step and phase the ranks are compared with their median, and of a rank's differences over the steps the median
counts: neither one slow step nor a few slow ranks move what the others are measured by. Time spent waiting for other
ranks must be left out beforehand (`titan_metrics.waits`), or those who wait look as slow as the one they wait for.

The yardstick is the step: a phase of a millisecond may vary by half without anybody being late.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple


class Phase(NamedTuple):
    """How long a rank was busy in one phase of one step."""

    rank: int
    step: int
    name: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A rank that is slower than the median of the ranks in a phase."""

    rank: int
    phase: str
    seconds: float
    """How much longer than the median of the ranks it takes in a step: the median over steps."""
    typical: float
    """Seconds that the median rank takes."""
    steps: int
    """In how many steps it was slower by at least half of `seconds`."""
    of_steps: int
    """How many steps were compared."""

    def __str__(self) -> str:
        return (
            f"rank {self.rank} is slow in {self.phase}: {self.seconds * 1e3:.1f} ms a step more than the ranks' median "
            f"of {self.typical * 1e3:.1f} ms, in {self.steps} of {self.of_steps} steps"
        )


def find_stragglers(phases: Iterable[Phase], *, share: float = 0.1, seconds: float = 0.001) -> list[Straggler]:
    """The ranks that are slower than the median, the slowest first.

    Args:
        phases: of all ranks. Steps that only one rank has are left out.
        share: how much slower, as a share of the ranks' median time of a whole step.
        seconds: how much slower at least.
    """
    by_phase: dict[str, dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    of_step: dict[tuple[int, int], float] = defaultdict(float)
    for phase in phases:
        ranks = by_phase[phase.name][phase.step]
        ranks[phase.rank] = ranks.get(phase.rank, 0.0) + phase.seconds
        of_step[phase.step, phase.rank] += phase.seconds
    if not of_step:
        return []
    bound = max(seconds, share * median(of_step.values()))
    found = []
    for name, steps in by_phase.items():
        compared = [ranks for ranks in steps.values() if len(ranks) > 1]
        excess: dict[int, list[float]] = defaultdict(list)
        for ranks in compared:
            middle = median(ranks.values())
            for rank, value in ranks.items():
                excess[rank].append(value - middle)
        typical = median(median(ranks.values()) for ranks in compared) if compared else 0.0
        for rank, values in excess.items():
            more = median(values)
            if more >= bound:
                often = sum(value >= more / 2 for value in values)
                found.append(
                    Straggler(rank=rank, phase=name, seconds=more, typical=typical, steps=often, of_steps=len(values))
                )
    return sorted(found, key=lambda straggler: -straggler.seconds)


def summary(stragglers: Sequence[Straggler]) -> str:
    """One line for each, or one that says there is none."""
    return "\n".join(map(str, stragglers)) if stragglers else "No rank is slower than the others."
