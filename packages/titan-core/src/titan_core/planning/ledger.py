"""Sums of bytes by category as a step goes on, and what they were when most was alive. Imports no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Category = Literal["parameters", "gradients", "optimizer", "activations", "communication", "other"]
"""As in `titan_core.planning.memory_use.MemoryUse`."""

CATEGORIES: tuple[Category, ...] = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "communication",
    "other",
)
Change = tuple[Category, int]

_INDEX: Mapping[Category, int] = {category: i for i, category in enumerate(CATEGORIES)}


@dataclass(frozen=True)
class Segment:
    """A run of changes: by how much it raises the sum at most, each category then, and each at its end."""

    top: int
    at_top: tuple[int, ...]
    net: tuple[int, ...]


def condensed(changes: Iterable[Change]) -> Segment:
    """As much of `changes` as matters to a ledger."""
    now = [0] * len(CATEGORIES)
    total = top = 0
    at_top = tuple(now)
    for category, amount in changes:
        now[_INDEX[category]] += amount
        total += amount
        if total > top:
            top, at_top = total, tuple(now)
    return Segment(top, at_top, tuple(now))


class Ledger:
    """What is alive, and was when most was."""

    def __init__(self, held: Mapping[Category, int]) -> None:
        """`held`: what is alive from the beginning."""
        self._now = [held.get(category, 0) for category in CATEGORIES]
        self._total = self._most = sum(self._now)
        self._at_peak = list(self._now)

    def add(self, category: Category, amount: int) -> None:
        """So many bytes are allocated, or given back if negative."""
        self._now[_INDEX[category]] += amount
        self._total += amount
        if self._total > self._most:
            self._most, self._at_peak = self._total, list(self._now)

    def passing(self, category: Category, amount: int) -> None:
        """So many bytes live for a moment."""
        self.add(category, amount)
        self.add(category, -amount)

    def apply(self, segment: Segment) -> None:
        """A run of changes."""
        if self._total + segment.top > self._most:
            self._most = self._total + segment.top
            self._at_peak = [now + change for now, change in zip(self._now, segment.at_top, strict=True)]
        self._now = [now + change for now, change in zip(self._now, segment.net, strict=True)]
        self._total = sum(self._now)

    @property
    def peak(self) -> dict[Category, int]:
        """Each category when most was alive."""
        return dict(zip(CATEGORIES, self._at_peak, strict=True))

    @property
    def alive(self) -> dict[Category, int]:
        """Each category now."""
        return dict(zip(CATEGORIES, self._now, strict=True))
