"""What `titan-doctor` measures, and what it takes for far from the others. Imports no torch."""

from dataclasses import dataclass

PROBES = ("matmul", "memory", "links", "clocks", "disk")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure and judge."""

    probes: tuple[str, ...] = PROBES
    """Which of `PROBES`."""
    slower_than: float = 0.2
    """Ranks are flagged whose rate is lower than the ranks' median by more than this share of it."""
    clock_seconds: float = 0.1
    """Ranks are flagged whose clock is further than this from the ranks' median."""
    megabytes: int = 64
    """Size of messages, copies and files, in 2**20 bytes."""
    repetitions: int = 10
    """Of which the median counts."""
