"""What a source of documents is, to the rest of this package: parts in an order, under a fingerprint of their content.

A source is a finite collection of documents in a fixed order, cut into parts that can be read in any order by any
process; each part streams its documents. Text that is read often is tokenized once into a token store, where each
document and each window can be reached in constant time; so a source itself needs no index of its documents.

Another kind of source is a class with these members, given to `dataset.open_dataset`.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from titan_data.errors import DataError


class Piece(NamedTuple):
    """A stretch of a document's text."""

    text: str
    ends_document: bool


class Record(NamedTuple):
    """A row of a table, or the JSON object of a line."""

    fields: Mapping[str, Any]
    find_place: Callable[[], str]

    @property
    def place(self) -> str:
        """The file and line, or row, for messages; finding a line's number may take reading the file."""
        return self.find_place()


@dataclass
class ReadCounts:
    """What was left out while reading."""

    skipped_files: int = 0


class Part(Protocol):
    """Some documents of a source, in order, read by themselves.

    It can be pickled, so that it may be read in another process. What it reads takes bounded memory.
    """

    @property
    def size_bytes(self) -> int:
        """How much there is to read, about; used to share work and to show progress."""
        ...

    def pieces(self, counts: ReadCounts) -> Iterator[Piece]:
        """Yields its documents in pieces of bounded size, while keeping `counts`.

        Raises:
            DataError: for malformed content, naming file and line, or if the content is not what was fingerprinted.
        """
        ...


@runtime_checkable
class RecordPart(Part, Protocol):
    """A part whose documents have fields: lines of JSONL, rows of a table."""

    def records(self) -> Iterator[Record]:
        """Yields all records.

        Raises:
            DataError: as `pieces` does.
        """
        ...


class Source(Protocol):
    """An ordered, finite collection of documents."""

    @property
    def fingerprint(self) -> str:
        """A hash of the content in order, and of how text is taken from it; wherever it lies."""
        ...

    @property
    def parts(self) -> Sequence[Part]:
        """Its parts in order. How a source is cut is a function of its content alone."""
        ...

    def describe(self) -> str:
        """Returns one line about it."""
        ...


def source_bytes(source: Source) -> int:
    """How much there is to read in all parts, about."""
    return sum(part.size_bytes for part in source.parts)


def read_part(part: Part, counts: ReadCounts) -> Iterator[Piece]:
    """Yields the documents of a part, which may be anybody's, as `Part.pieces` promises them.

    Raises:
        DataError: if it yields something else, ends within a document, or cannot be read.
    """
    within = False
    with _reading(part):
        for piece in part.pieces(counts):
            if not (isinstance(piece, Piece) and isinstance(piece.text, str)):
                raise DataError(
                    f"{_name(part)} yields {_kind(piece)}, and not titan_data.source.Piece(text, ends_document)."
                )
            within = not piece.ends_document
            yield piece
    if within:
        raise DataError(
            f"{_name(part)} ends within a document: the last Piece of a part has ends_document=True, since a document "
            "lies in one part."
        )


def read_records(part: RecordPart) -> Iterator[Record]:
    """Yields the records of a part, which may be anybody's.

    Raises:
        DataError: as `RecordPart.records` does, or if it cannot be read.
    """
    with _reading(part):
        yield from part.records()


@contextlib.contextmanager
def _reading(part: Part) -> Generator[None]:
    """Says which part the system's errors are about, so that nobody takes them for errors of writing."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{_name(part)} cannot be read ({type(error).__name__}: {error}).") from error


def _name(part: Part) -> str:
    return f"the source {type(part).__module__}:{type(part).__qualname__}"


def _kind(piece: object) -> str:
    return f"a Piece of {type(piece.text).__name__}" if isinstance(piece, Piece) else f"a {type(piece).__name__}"


def all_pieces(source: Source, counts: ReadCounts | None = None) -> Iterator[Piece]:
    """Yields all documents of a source, one part after the other.

    Raises:
        DataError: as `read_part` does.
    """
    counts = counts or ReadCounts()
    for part in source.parts:
        yield from read_part(part, counts)
