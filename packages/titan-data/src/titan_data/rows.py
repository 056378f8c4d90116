"""What a batch is made of: rows of tokens, numbered within a finite dataset, or within the endless run over one.

    Rows      a finite dataset of n rows, in no order: windows of a token stream, packs of conversations
    Samples   an endless sequence of rows, in the order of a run: a shuffled dataset, a mixture of several

Both give rows as int64 arrays [R, S]: `tokens`; `labels`, the tokens to predict, `IGNORED_LABEL` where there is no
loss; `positions`, which restart with each document; `document_ids`, 0, 1, 2, ... within the row. Both can be pickled,
so that worker processes may read them.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

IGNORED_LABEL = -100
NO_ROW = -1

RowArrays = dict[str, NDArray[np.int64]]


class Rows(Protocol):
    """A finite dataset of rows, each reached in constant time."""

    @property
    def seq_len(self) -> int:
        """Tokens in a row, padding included: S."""
        ...

    @property
    def tokens_per_row(self) -> float:
        """How many of them are content, on average."""
        ...

    @property
    def documents_per_row(self) -> float:
        """How many documents, or conversations, a row holds on average."""
        ...

    def __len__(self) -> int:
        """How many rows there are: n."""
        ...

    def read(self, rows: NDArray[np.int64]) -> RowArrays:
        """Returns the rows of these numbers, [R]; `NO_ROW` makes a row of nothing but padding."""
        ...


@runtime_checkable
class Samples(Protocol):
    """An endless sequence of rows; sample g is reached in constant time, whatever g."""

    @property
    def row_count(self) -> int:
        """How many different rows there are."""
        ...

    def read(self, samples: NDArray[np.int64]) -> RowArrays:
        """Returns the rows that stand at these places of the sequence, [R]; `NO_ROW` makes a padded row.

        Beside the arrays of `Rows` there is `sample_ids` [R]: the number of each row, `NO_ROW` for padding.
        """
        ...

    def epochs(self, samples: int) -> Mapping[str, float]:
        """Returns how often each source has been read when so many samples are done, e.g. 1.37."""
        ...
