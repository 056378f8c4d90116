"""Text that is read and tokenized while it trains, instead of once beforehand: a section of a training config.

Imports nothing but the standard library, so that a command line can show and check it at once.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How a corpus is dealt into virtual streams."""

    streams: int = 64
    """Virtual streams, each with documents of its own, from which every global batch takes equally many rows. It
    divides the global batch, and the number of data-parallel ranks divides it, now and after any restart."""

    def problems(self) -> list[str]:
        """Every value that means nothing, each as one sentence; empty if there is none."""
        return [] if self.streams >= 1 else [f"data.stream.streams is {self.streams}; it must be at least 1."]
