"""Several sources in one run, each with its share: a section of a training config.

Imports nothing but the standard library, so that a command line can show and check it at once.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from titan_data.config import WHERE, named_problems

WeighBy = Literal["tokens", "documents"]


@dataclass(frozen=True, kw_only=True)
class WeightChange:
    """New weights from a step on."""

    step: int
    """The first global batch to be mixed so, counted from 0, and at least 1; batches that the run skips count."""

    weights: Mapping[str, float]
    """Name -> weight, for every source."""


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Which sources are mixed, and how."""

    sources: Mapping[str, str] = field(default_factory=dict, metadata=WHERE)
    """Name -> corpus, as in data.source; data's other fields hold for all of them, and a tokenizer that is trained is
    trained on the first. A name is what the source is called in logs and in weights; its own order of reading depends
    on it too."""

    weights: Mapping[str, float] = field(default_factory=dict)
    """Name -> share of the source, relative to the others'; 0: none until a change of weights gives it some. Without
    any, all have the same; else every source is named."""

    changes: tuple[WeightChange, ...] = ()
    """Steps at which the weights change, in their order."""

    weigh_by: WeighBy = "tokens"
    """What the weights are shares of."""

    block_size: int = 1000
    """Samples in a block, in each of which every source has exactly its share, rounded to whole samples."""

    def problems(self) -> list[str]:
        """What means nothing or contradicts itself, each as one sentence; empty if nothing does."""
        if not self.sources:
            return ["data.mixture.sources names no source; give each a name and a corpus."]
        found = named_problems("data.mixture.sources", self.sources)
        if self.block_size < 1:
            found.append(f"data.mixture.block_size is {self.block_size}; a block has at least 1 sample.")
        if self.weights:
            found += self._weight_problems("data.mixture.weights", self.weights)
        before = 0
        for change in self.changes:
            what = f"the change of weights at step {change.step}"
            if change.step <= before:
                found.append(f"{what} comes after step {before}; put changes in order, the first at step 1 or later.")
            before = max(before, change.step)
            found += self._weight_problems(what, change.weights)
        return found

    def _weight_problems(self, what: str, weights: Mapping[str, float]) -> Iterator[str]:
        if set(weights) != set(self.sources):
            yield (
                f"{what} names {', '.join(weights) or 'nothing'}, but the sources are {', '.join(self.sources)}; "
                "give a weight to each of them."
            )
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                yield f"{what} gives {name} {weight}; a weight is a finite number of 0 or more."
        if weights and not any(weights.values()):
            yield f"{what} gives every source 0, so that there is nothing to read; give one of them more."
