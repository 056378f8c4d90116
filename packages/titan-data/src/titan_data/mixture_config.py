"""Several sources in one run, each with its share: a section of a training config.

Imports nothing but the standard library, so that a command line can show and check it at once.
"""

from dataclasses import dataclass, field
from typing import Literal

from titan_data.config import WHERE

WeighBy = Literal["tokens", "documents"]


@dataclass(frozen=True, kw_only=True)
class MixtureSource:
    """One source of a mixture."""

    name: str
    """What it is called in logs and in weights; its own order of reading depends on it too."""

    source: str = field(metadata=WHERE)
    """The corpus, as in data.source; data's other fields hold for all sources of a mixture."""

    weight: float = 1.0
    """Its share, relative to the others'; 0: none until a change of weights gives it some."""


@dataclass(frozen=True, kw_only=True)
class WeightChange:
    """New weights from a step on."""

    step: int
    """The first global batch to be mixed so, counted from 0; batches that the run skips count."""

    weights: tuple[float, ...]
    """A weight for each source, in their order."""


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Which sources are mixed, and how."""

    sources: tuple[MixtureSource, ...]
    """The sources, all with one tokenizer."""

    changes: tuple[WeightChange, ...] = ()
    """Steps at which the weights change, in their order."""

    weigh_by: WeighBy = "tokens"
    """What the weights are shares of."""

    block_size: int = 1000
    """Samples in a block, in each of which every source has exactly its share, rounded to whole samples."""
