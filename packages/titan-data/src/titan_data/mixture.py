"""Several datasets in one order, each with its share, exact in every block and computed in constant time.

    block       `block_size` samples in a row; each source has the same number of them in every block
    segment     the samples from one change of weights to the next; blocks are counted from its first sample, and the
                last one may be cut short
    layout      which source stands at each place of a block: a permutation seeded by the block's first sample

Sample g lies in one segment and one block of it. How many samples of its source lie before it is the sum of those
before the segment (counted once), those of the whole blocks between (a product), and those before it in its block (seen
in the layout). That number is its place in the source's own order (`order.py`), in which each row comes once an epoch.
"""

import bisect
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from titan_data.errors import DataError
from titan_data.mixture_config import WeighBy
from titan_data.order import Order
from titan_data.permutation import permute
from titan_data.rows import NO_ROW, RowArrays, Rows

_CACHED_BLOCKS = 64


@dataclass(frozen=True)
class _Segment:
    start: int
    """Its first sample."""
    counts: NDArray[np.int64]
    """Samples of each source in a block: [sources]."""
    before: NDArray[np.int64]
    """Samples of each source before the segment: [sources]."""


class _Layout(NamedTuple):
    sources: NDArray[np.int64]
    """Which source stands at each place: [block size]."""
    before: NDArray[np.int64]
    """How many of the same source stand before it in the block: [block size]."""


class Mixture:
    """Samples of several datasets in a fixed proportion; `Samples`.

    A sample's id is its row's number in the row of all sources, one after the other; `source_of` tells them apart.
    """

    def __init__(
        self,
        sources: Mapping[str, Rows],
        weights: Mapping[str, float],
        *,
        seed: int,
        shuffle: bool = True,
        weigh_by: WeighBy = "tokens",
        block_size: int = 1000,
        changes: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:
        """Lays out the mixture; nothing is read.

        Args:
            sources: the datasets by name; rows of one length.
            weights: each source's share, relative to the others'.
            seed: fixes the order of each block and, with a source's name, of each epoch of it.
            shuffle: read each source in a new random order each epoch, or in its own; blocks are always shuffled.
            weigh_by: what the weights are shares of; converted to rows by the sources' averages.
            block_size: samples in a block.
            changes: samples at which new weights begin (the number of a global batch times its size), and these.

        Raises:
            DataError: for names that do not agree, weights that mean nothing, or a share below one sample in a block.
        """
        if not sources:
            raise DataError("a mixture has at least one source; there is none.")
        if len(lengths := {rows.seq_len for rows in sources.values()}) > 1:
            raise DataError(f"the sources of a mixture have rows of different lengths: {sorted(lengths)} tokens.")
        if block_size < 1:
            raise DataError(f"block_size is {block_size}; a block has at least 1 sample.")
        self.sources, self._block_size, self._seed = dict(sources), block_size, seed
        self.names = tuple(sources)
        self._rows = tuple(sources.values())
        self._orders = [
            Order(row_count=len(rows), seed=_seed_of(seed, name), shuffle=shuffle) for name, rows in sources.items()
        ]
        self._first_ids = np.cumsum([0, *map(len, self._rows)])
        self._segments: list[_Segment] = []
        for start, shares in sorted({0: weights, **(changes or {})}.items()):
            if start < 0 or (start == 0 and shares is not weights):
                raise DataError(f"weights cannot change at sample {start}: a change comes after the first sample.")
            counts = self._counts(shares, weigh_by)
            before = self._counted(start) if self._segments else np.zeros(len(counts), dtype=np.int64)
            self._segments.append(_Segment(start, counts, before))

    def __getstate__(self) -> dict[str, object]:
        # Layouts are cheaper to compute than to send.
        return {name: value for name, value in self.__dict__.items() if name != "_layout"}

    @property
    def row_count(self) -> int:
        """How many rows the sources have together."""
        return int(self._first_ids[-1])

    def place(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns each sample's source and its place in that source's order: two int64 [K]."""
        sources, places = np.empty_like(samples), np.empty_like(samples)
        starts = np.array([segment.start for segment in self._segments])
        segments = np.searchsorted(starts, samples, side="right") - 1
        blocks, offsets = np.divmod(samples - starts[segments], self._block_size)
        for number, block in {(int(s), int(b)) for s, b in zip(segments, blocks, strict=True)}:
            here = (segments == number) & (blocks == block)
            segment, layout = self._segments[number], self._layout(number, block)
            sources[here] = source = layout.sources[offsets[here]]
            places[here] = (segment.before + block * segment.counts)[source] + layout.before[offsets[here]]
        return sources, places

    def read(self, samples: NDArray[np.int64]) -> RowArrays:
        """Returns the rows at these places of the mixture, [R]; `NO_ROW` makes a padded row."""
        valid = np.flatnonzero(samples != NO_ROW)
        sources, places = self.place(samples[valid])
        ids = np.full(len(samples), NO_ROW, dtype=np.int64)
        # Padding is the same whoever makes it.
        batch: RowArrays = self._rows[0].read(ids) if len(valid) < max(1, len(samples)) else {}
        for source in np.unique(sources).tolist():
            chosen = valid[sources == source]
            rows = self._orders[source].rows(places[sources == source])
            ids[chosen] = rows + self._first_ids[source]
            for name, array in self._rows[source].read(rows).items():
                batch.setdefault(name, np.empty((len(samples), array.shape[1]), dtype=np.int64))[chosen] = array
        return batch | {"sample_ids": ids}

    def epochs(self, samples: int) -> Mapping[str, float]:
        """Returns how often each source has been read when so many samples are done, e.g. {"wiki": 1.37}."""
        counts = self._counted(samples).tolist()
        return {name: order.epoch(count) for name, order, count in zip(self.names, self._orders, counts, strict=True)}

    def source_of(self, sample_ids: NDArray[np.int64]) -> list[str | None]:
        """Returns the name of the source that each sample came from, None for padding."""
        found = np.searchsorted(self._first_ids, sample_ids, side="right") - 1
        return [None if source < 0 else self.names[source] for source in found.tolist()]

    def describe(self) -> str:
        """Returns a line for each source, with its share of the samples from the run's start."""
        share = self._segments[0].counts / self._block_size
        lines = [
            f"{name}: {part:.1%} of the samples, {len(rows):,} rows"
            for name, rows, part in zip(self.names, self._rows, share.tolist(), strict=True)
        ]
        lines += [
            f"from sample {segment.start:,}: "
            + ", ".join(
                f"{name} {part:.1%}"
                for name, part in zip(self.names, (segment.counts / self._block_size).tolist(), strict=True)
            )
            for segment in self._segments[1:]
        ]
        return "\n".join([f"mixture in blocks of {self._block_size:,} samples", *lines])

    def _counts(self, weights: Mapping[str, float], weigh_by: WeighBy) -> NDArray[np.int64]:
        """How many samples of each source a block has: largest remainders, ties in the order of the sources."""
        if set(weights) != set(self.names):
            raise DataError(f"weights are given for {', '.join(weights)}; the sources are {', '.join(self.names)}.")
        per_row = [rows.tokens_per_row if weigh_by == "tokens" else rows.documents_per_row for rows in self._rows]
        shares = np.array([weights[name] for name in self.names], dtype=np.float64)
        if not (np.isfinite(shares).all() and (shares >= 0).all() and shares.any()):
            raise DataError(f"the weights {dict(weights)} are no shares: all must be 0 or more, and one above 0.")
        in_rows = shares / np.array(per_row)
        # Rounded, so that 0.29 * 100 is 29 and not what is left of it in binary.
        quotas = np.round(in_rows / in_rows.sum() * self._block_size, 9)
        counts = np.floor(quotas).astype(np.int64)
        largest = np.argsort(counts - quotas, kind="stable")
        counts[largest[: self._block_size - int(counts.sum())]] += 1
        for name, share, count in zip(self.names, shares.tolist(), counts.tolist(), strict=True):
            if share and not count:
                raise DataError(
                    f"the weight {share} of {name} is less than one sample in a block of {self._block_size}, so that "
                    "it would never be read. Choose larger blocks, a larger weight, or the weight 0."
                )
        return counts

    def _counted(self, samples: int) -> NDArray[np.int64]:
        """How many samples of each source are among the first `samples`."""
        number = bisect.bisect_right(self._segments, samples, key=lambda segment: segment.start) - 1
        segment = self._segments[number]
        block, offset = divmod(samples - segment.start, self._block_size)
        begun = np.bincount(self._layout(number, block).sources[:offset], minlength=len(self.names))
        return segment.before + block * segment.counts + begun

    @functools.cached_property
    def _layout(self) -> "functools._lru_cache_wrapper[_Layout]":
        return functools.lru_cache(_CACHED_BLOCKS)(self._lay_out)

    def _lay_out(self, number: int, block: int) -> _Layout:
        segment = self._segments[number]
        first = segment.start + block * self._block_size
        places = permute(
            np.arange(self._block_size), size=self._block_size, seed=_seed_of(self._seed, "blocks of"), epoch=first
        )
        sources = np.searchsorted(np.cumsum(segment.counts), places, side="right")
        before = np.empty(self._block_size, dtype=np.int64)
        for source, count in enumerate(segment.counts.tolist()):
            before[sources == source] = np.arange(count)
        return _Layout(sources, before)


def _seed_of(seed: int, name: str) -> int:
    """A seed for each name, so that sources of one size do not walk in step."""
    digest = hashlib.blake2b(f"titan-data mixture, seed {seed}, {name!r}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
