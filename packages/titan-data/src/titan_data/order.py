"""The order law: which windows stand in global batch t, as a pure function of the data, the seed and t.

    t        a global batch, counted from the run's first
    j        a row of it, 0 <= j < B
    g        a sample, counted from the run's first: g = t * B + j
    epoch    g // n, where n windows make up the data
    window   permutation(seed, epoch)(g % n), or g % n without shuffling

Nothing here knows about ranks: a rank asks for some of the rows. So the data a step sees cannot depend on the
number of ranks, and a run resumes from t alone, on any number of them. A batch may span epochs.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from titan_data.permutation import permute


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order in which `window_count` windows fill global batches of `global_batch_size` rows."""

    window_count: int
    global_batch_size: int
    seed: int
    shuffle: bool = True

    def windows(self, batch: int, rows: range) -> NDArray[np.int64]:
        """Returns the windows at these rows of a global batch: int64 [len(rows)]."""
        samples = batch * self.global_batch_size + np.arange(rows.start, rows.stop, dtype=np.int64)
        epochs, windows = np.divmod(samples, self.window_count)
        if self.shuffle:
            for epoch in np.unique(epochs):
                here = epochs == epoch
                windows[here] = permute(windows[here], size=self.window_count, seed=self.seed, epoch=int(epoch))
        return windows

    def epoch(self, batch: int) -> float:
        """Returns how many times the data has been read when `batch` batches are done, e.g. 1.37."""
        return batch * self.global_batch_size / self.window_count
