"""What a model is tested on while it trains: a section of a training config.

Imports nothing but the standard library, so that a command line can show and check it at once.
"""

from dataclasses import dataclass, field

from titan_data.config import WHERE


@dataclass(frozen=True, kw_only=True)
class ValidationSource:
    """One set to validate on."""

    name: str
    """What it is called in logs."""

    source: str = field(metadata=WHERE)
    """The corpus, as in data.source; the tokenizer and data's other fields are those of training."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Which sets, and how much of them."""

    sets: tuple[ValidationSource, ...] = ()
    """The sets; none: no validation."""

    every_steps: int = 500
    """Steps from one validation to the next; there is one at the end of the run, too."""

    max_rows: int | None = None
    """Rows to read of each set, spread evenly over it; default: all."""
