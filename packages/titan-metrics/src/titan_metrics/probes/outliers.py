"""Which ranks are far from the others, by one number from each.

The median of the ranks is what they are compared with: one bad rank, or a few, do not move it. That needs at least
three ranks; of two that differ nobody can say which one is as it should be, so the slower one is named. A collective
takes as long for all its ranks as for the slowest: slow are then all ranks of a group, next to those of other groups.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one probe has measured, on all ranks."""

    probe: str
    """For example `all_reduce over tp`."""
    unit: str
    """FLOP/s, B/s or s."""
    values: tuple[float, ...]
    """In rank order."""

    @property
    def median(self) -> float:
        """That of all ranks."""
        return median(self.values)


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """A rank that is far from the median of the ranks."""

    rank: int
    probe: str
    unit: str
    value: float
    median: float


def find_slow(rates: Iterable[Reading], *, share: float = 0.2) -> list[Outlier]:
    """The ranks whose rate is below (1 - `share`) times the median of the ranks, the slowest first."""
    found = [
        Outlier(rank=rank, probe=reading.probe, unit=reading.unit, value=value, median=reading.median)
        for reading in rates
        for rank, value in enumerate(reading.values)
        if value < (1 - share) * reading.median
    ]
    return sorted(found, key=lambda outlier: outlier.value / outlier.median)


def find_apart(reading: Reading, *, bound: float) -> list[Outlier]:
    """The ranks whose value is more than `bound` above or below the median of the ranks, the furthest first."""
    found = [
        Outlier(rank=rank, probe=reading.probe, unit=reading.unit, value=value, median=reading.median)
        for rank, value in enumerate(reading.values)
        if abs(value - reading.median) > bound
    ]
    return sorted(found, key=lambda outlier: -abs(outlier.value - outlier.median))
