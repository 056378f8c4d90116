"""Conversations in rows: which of them share a row, planned once, and the rows themselves.

A conversation of T tokens takes T - 1 places: each but the last is fed to the model, each but the first may be a label.
Best fit, longest first: a conversation goes into the row that it leaves the least room in, or into a new one. (Johnson,
"Near-optimal bin packing algorithms", 1973: at most 11/9 of the fewest rows possible, and a constant more.)
"""

import bisect
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from titan_data.conversation_store import ConversationStore
from titan_data.rows import IGNORED_LABEL, NO_ROW, RowArrays
from titan_data.sft_config import TooLong


class Packs(NamedTuple):
    """Which conversations stand in which row."""

    conversations: NDArray[np.int64]
    """Their numbers, row by row, in rising order within each: int64 [conversations in rows]."""
    starts: NDArray[np.int64]
    """Where each row begins in them, then their number: int64 [rows + 1]."""
    truncated: int
    """Conversations that keep only their beginning."""
    dropped: int
    """Conversations that are in no row: too long, or with nothing to learn in what fits."""


def plan_packs(store: ConversationStore, *, seq_len: int, too_long: TooLong, pack: bool) -> Packs:
    """Decides which conversations share a row of `seq_len` tokens; the same every time."""
    places = np.diff(store.starts) - 1
    fits = (places >= 1) & (places <= seq_len)
    truncated = 0
    if too_long == "truncate":
        for number in np.flatnonzero(places > seq_len):
            start = store.starts[number]
            fits[number] = store.learned[start + 1 : start + 1 + seq_len].any()
            truncated += int(fits[number])
    chosen = np.flatnonzero(fits)
    sizes = np.minimum(places[chosen], seq_len)
    rows = best_fit(sizes, seq_len) if pack else np.arange(len(chosen))
    order = np.argsort(rows, kind="stable")
    counts = np.bincount(rows, minlength=0)
    return Packs(chosen[order], np.concatenate([[0], np.cumsum(counts)]), truncated, len(places) - len(chosen))


def best_fit(sizes: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Returns the bin that each thing goes into: int64 [K]; bins are numbered by the first thing in each.

    Args:
        sizes: int64 [K], each at least 1 and at most `capacity`.
        capacity: what a bin holds.
    """
    bins = np.empty(len(sizes), dtype=np.int64)
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys, sorted
    count = 0
    order = np.argsort(-sizes, kind="stable")
    for thing, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        found = bisect.bisect_left(rooms, size)
        if found < len(rooms):
            room = rooms[found]
            bin = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[found]
        else:
            bin, room = count, capacity
            count += 1
        bins[thing] = bin
        if left := room - size:
            if left not in with_room:
                bisect.insort(rooms, left)
                with_room[left] = []
            with_room[left].append(bin)
    # Longest first would otherwise leave all full rows at the front of an unshuffled epoch.
    _, first, number = np.unique(bins, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first, kind="stable"), kind="stable")[number]


@dataclass(frozen=True)
class PackedConversations:
    """Rows of conversations that do not see each other; `Rows`."""

    store: ConversationStore
    packs: Packs
    seq_len: int
    pad_id: int

    @property
    def tokens_per_row(self) -> float:
        """How many places are taken, on average."""
        sizes = np.minimum(np.diff(self.store.starts)[self.packs.conversations] - 1, self.seq_len)
        return float(sizes.sum()) / max(1, len(self))

    @property
    def documents_per_row(self) -> float:
        """How many conversations a row holds, on average."""
        return len(self.packs.conversations) / max(1, len(self))

    def __len__(self) -> int:
        return len(self.packs.starts) - 1

    def read(self, rows: NDArray[np.int64]) -> RowArrays:
        """Returns these rows; what is left of a row is padding, a document of its own."""
        R, S = len(rows), self.seq_len
        tokens, labels, positions, document_ids = np.empty((4, R, S), dtype=np.int64)
        for row, number in enumerate(rows.tolist()):
            place = document = 0
            for conversation in self._conversations(number):
                start, end = self.store.starts[conversation : conversation + 2].tolist()
                size = min(end - start - 1, S)
                here = slice(place, place + size)
                tokens[row, here] = self.store.ids[start : start + size]
                labels[row, here] = self.store.ids[start + 1 : start + 1 + size]
                labels[row, here][~self.store.learned[start + 1 : start + 1 + size]] = IGNORED_LABEL
                positions[row, here] = np.arange(size)
                document_ids[row, here] = document
                place, document = place + size, document + 1
            tokens[row, place:], labels[row, place:] = self.pad_id, IGNORED_LABEL
            positions[row, place:], document_ids[row, place:] = np.arange(S - place), document
        return {"tokens": tokens, "labels": labels, "positions": positions, "document_ids": document_ids}

    def _conversations(self, row: int) -> list[int]:
        if row == NO_ROW:
            return []
        start, end = self.packs.starts[row : row + 2].tolist()
        return self.packs.conversations[start:end].tolist()
