"""Finite sets to measure a model on: each row exactly once, however many ranks share them.

Bits per byte compares models with different tokenizers. With a summed loss in nats over all labels of a set, and the
bytes of text that those labels stand for (`ValidationSet.count_bytes`, summed over all batches and ranks):

    bits per byte = loss / ln(2) / bytes

Control tokens, such as the end of a text, stand for no bytes; what the model pays for them counts, since without them
it would not be known where documents end.
"""

import functools
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from titan_data.errors import DataError
from titan_data.loader import Batch
from titan_data.rows import IGNORED_LABEL, NO_ROW, Rows
from titan_data.token_text import token_bytes
from titan_data.tokenizer import Tokenizer


class ValidationSet:
    """The rows of a dataset in their own order, once."""

    def __init__(self, name: str, rows: Rows, tokenizer: Tokenizer, *, max_rows: int | None = None) -> None:
        """Chooses the rows.

        Args:
            name: what it is called in logs.
            rows: what is read.
            tokenizer: made its tokens; tells how many bytes they stand for.
            max_rows: how many rows to read, spread evenly over the dataset; default: all.

        Raises:
            DataError: if `max_rows` is below 1, or there is no row.
        """
        if max_rows is not None and max_rows < 1:
            raise DataError(f"validation.max_rows is {max_rows}; it must be at least 1.")
        if not len(rows):
            raise DataError(f"the validation set {name} has no rows. Choose a corpus that has some.")
        self.name, self._rows, self._tokenizer = name, rows, tokenizer
        count = len(rows) if max_rows is None else min(max_rows, len(rows))
        self._chosen = np.arange(count, dtype=np.int64) * len(rows) // count

    def __len__(self) -> int:
        """How many rows are read."""
        return len(self._chosen)

    def batches(self, *, rows: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Yields one rank's batches of `rows` rows; as many for each rank.

        Each holds what a batch of `BatchLoader` does. The last ones are filled up with rows that have no labels.

        Raises:
            ValueError: for sizes that mean nothing.
        """
        if rows < 1 or not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} of {ranks} with {rows} rows: there is no such share of a validation set")
        together = rows * ranks
        for first in range(0, len(self), together):
            wanted = first + rank * rows + np.arange(rows)
            ids = np.full(rows, NO_ROW, dtype=np.int64)
            valid = wanted < len(self)
            ids[valid] = self._chosen[wanted[valid]]
            arrays = self._rows.read(ids) | {"sample_ids": ids}
            yield {name: torch.from_numpy(array) for name, array in arrays.items()}

    def count_bytes(self, labels: torch.Tensor) -> int:
        """Returns how many bytes of UTF-8 text these labels stand for; ignored ones for none."""
        return int(self._token_bytes[labels[labels != IGNORED_LABEL].numpy()].sum())

    @functools.cached_property
    def _token_bytes(self) -> NDArray[np.int64]:
        return token_bytes(self._tokenizer)
