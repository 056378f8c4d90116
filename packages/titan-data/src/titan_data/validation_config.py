"""What a model is tested on while it trains: a section of a training config.

Imports nothing but the standard library, so that a command line can show and check it at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from titan_data.config import named_problems


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Which sets, and how much of them."""

    sets: Mapping[str, str] = field(default_factory=dict)
    """Name -> corpus, as in data.source; the tokenizer and data's other fields are those of training. Without
    any, there is no validation."""

    every: int = 500
    """Steps from one validation to the next; there is one at the end of the run, too."""

    max_rows: int | None = None
    """Rows to read of each set, spread evenly over it; None: all."""

    def problems(self) -> list[str]:
        """Every value that means nothing, each as one sentence; empty if there is none."""
        found = named_problems("validation.sets", self.sets)
        if self.every < 1:
            found.append(f"validation.every is {self.every}; it must be at least 1.")
        if self.max_rows is not None and self.max_rows < 1:
            found.append(f"validation.max_rows is {self.max_rows}; it must be at least 1.")
        return found
