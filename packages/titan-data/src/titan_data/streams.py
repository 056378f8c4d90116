"""Documents that come in streams: a corpus dealt to a fixed number of virtual streams, each read on its own.

A virtual stream has documents of its own, in an order of its own, and reads them over and over. How many streams there
are is part of the experiment; how many ranks share them is not. A stream is resumed by its epoch and the number of
pieces that were consumed in it, which are read again and thrown away.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from titan_data.permutation import permute
from titan_data.pieces import pieces_of
from titan_data.source import Part, Piece, ReadCounts, Source, read_part


@dataclass
class EpochProgress:
    """How far an epoch has been read."""

    share: float = 0.0
    """Of the epoch, up to the last piece: from 0 to 1, about; 0 to the end if nobody knows how long it is."""


class StreamSource(Protocol):
    """Documents that can only be read in turn. It can be pickled, so that worker processes may read them."""

    def pieces(self, stream: int, streams: int, epoch: int, progress: EpochProgress) -> Iterator[Piece]:
        """Yields the documents of one stream of so many, in one epoch, in pieces, while keeping `progress`.

        They are the same every time. The streams' documents together are all documents, each once, and the same ones
        for a stream in every epoch.
        """
        ...


@dataclass(frozen=True)
class SourceStreams:
    """A source of parts, dealt to streams part by part; if there are fewer parts than streams, document by document."""

    source: Source
    seed: int
    shuffle: bool = True
    """Read the parts of a stream in a new random order each epoch; documents of a part stay in their order."""

    def pieces(self, stream: int, streams: int, epoch: int, progress: EpochProgress) -> Iterator[Piece]:
        """Yields the documents of one stream in one epoch; progress is by the size of its parts."""
        parts = self.source.parts
        if len(parts) < streams:
            if parts:
                sharing = len(range(stream % len(parts), streams, len(parts)))
                yield from _every(sharing, stream // len(parts), parts[stream % len(parts)], progress)
            return
        mine = parts[stream::streams]
        order = np.arange(len(mine))
        if self.shuffle:
            order = permute(order, size=len(mine), seed=self.seed, epoch=epoch * streams + stream)
        total, done = max(1, sum(part.size_bytes for part in mine)), 0
        for part in (mine[index] for index in order.tolist()):
            characters = 0
            for piece in read_part(part, ReadCounts()):
                characters += len(piece.text)
                # How far a packed or encoded file has been read is known at its end; until then its text stands for it.
                progress.share = (done + min(characters, part.size_bytes)) / total
                yield piece
            done += part.size_bytes
            progress.share = done / total


@dataclass(frozen=True)
class IterableStreams:
    """Any iterable of texts, such as a streaming dataset of the Hugging Face hub; each stream takes every n-th.

    Each stream reads all of it, so few streams, or a source that knows how to deal, serve a large corpus better.
    """

    texts: Callable[[int], Iterable[str]]
    """Begins an epoch, given its number; the same texts in every epoch, if need be in another order. Picklable."""

    def pieces(self, stream: int, streams: int, epoch: int, progress: EpochProgress) -> Iterator[Piece]:
        """Yields the documents of one stream in one epoch, of which nobody knows how many there are."""
        for text in itertools.islice(self.texts(epoch), stream, None, streams):
            yield from pieces_of(text)


def _every(step: int, first: int, part: Part, progress: EpochProgress) -> Iterator[Piece]:
    document = characters = 0
    for piece in read_part(part, ReadCounts()):
        characters += len(piece.text)
        progress.share = min(1.0, characters / max(1, part.size_bytes))
        if document % step == first:
            yield piece
        document += piece.ends_document
