"""The order law: which row stands at place g of a run over one dataset, as a pure function of its size, the seed and g.

    g        a sample, counted from the run's first; row j of global batch t is sample g = t * B + j
    epoch    g // n, where n rows make up the data
    row      permutation(seed, epoch)(g % n), or g % n without shuffling

Nothing here knows about ranks or batches: a rank asks for some of the samples. So the data a step sees cannot depend on
the number of ranks, and a run resumes from t alone, on any number of them. A batch may span epochs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from titan_data.permutation import permute
from titan_data.rows import NO_ROW, RowArrays, Rows


@dataclass(frozen=True, kw_only=True)
class Order:
    """The endless order in which `row_count` rows are read, each once an epoch."""

    row_count: int
    seed: int
    shuffle: bool = True

    def rows(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the rows at these places of the order: int64 [K]."""
        epochs, rows = np.divmod(samples, self.row_count)
        if self.shuffle:
            for epoch in np.unique(epochs):
                here = epochs == epoch
                rows[here] = permute(rows[here], size=self.row_count, seed=self.seed, epoch=int(epoch))
        return rows

    def epoch(self, samples: int) -> float:
        """Returns how often the data has been read when so many samples are done, e.g. 1.37."""
        return samples / self.row_count


class ShuffledRows:
    """One dataset, read over and over in a new order each epoch; `Samples`."""

    def __init__(self, rows: Rows, *, seed: int, shuffle: bool = True, name: str = "data") -> None:
        """Fixes the order of a dataset, which is called `name` where epochs are told."""
        self.rows, self.name = rows, name
        self.order = Order(row_count=len(rows), seed=seed, shuffle=shuffle)

    @property
    def row_count(self) -> int:
        """How many rows the dataset has."""
        return self.order.row_count

    def read(self, samples: NDArray[np.int64]) -> RowArrays:
        """Returns the rows at these places of the order."""
        rows = np.full(len(samples), NO_ROW, dtype=np.int64)
        rows[samples != NO_ROW] = self.order.rows(samples[samples != NO_ROW])
        return self.rows.read(rows) | {"sample_ids": rows}

    def epochs(self, samples: int) -> Mapping[str, float]:
        """Returns how often the data has been read when so many samples are done."""
        return {self.name: self.order.epoch(samples)}
