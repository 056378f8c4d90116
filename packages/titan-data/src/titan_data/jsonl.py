"""JSONL files: each line is a JSON object, whose text is a document. Blank lines do not count.

A plain file is cut into parts at fixed distances; a line belongs to the part in which it begins. A compressed file is
one part. A line has to fit into memory.
"""

import codecs
import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from titan_data.errors import DataError
from titan_data.records import TextOf
from titan_data.source import Piece, ReadCounts, Record
from titan_data.source_file import PART_BYTES, SourceFile

_READ_BYTES = 1 << 20
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class JsonLines:
    """The lines of a file that begin within some of its bytes."""

    file: SourceFile
    text: TextOf
    start: int
    end: int
    """Offsets in the file; a compressed file's parts are [0, size of the file), which is all of it."""

    @property
    def size_bytes(self) -> int:
        """How many bytes of the file."""
        return self.end - self.start

    def pieces(self, counts: ReadCounts) -> Iterator[Piece]:
        """Yields the lines' texts.

        Raises:
            DataError: for a line that is not UTF-8, not a JSON object, or has no text where it should.
        """
        for record in self.records():
            yield from self.text.pieces(record)

    def records(self) -> Iterator[Record]:
        """Yields the lines' objects.

        Raises:
            DataError: for a line that is not UTF-8, or not a JSON object.
        """
        with self.file.open() as file:
            for number, line in enumerate(self._lines(file), start=1):
                if number == 1 and self.start == 0:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    place = functools.partial(self._place, number)
                    yield Record(_parse(line, place), place)

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        if self.file.compression:
            yield from file
            return
        position = self.start
        if self.start:  # a line that began in the part before ends where this part's first begins
            file.seek(self.start - 1)
            position += len(file.readline()) - 1
        while position < self.end and (line := file.readline()):
            position += len(line)
            yield line

    def _place(self, number: int) -> str:
        # What comes before is counted only now that somebody asks. The part before ends with the line that it began.
        with self.file.open() as file:
            chunk = b"\n"
            while (position := file.tell()) < self.start:
                chunk = file.read(min(self.start - position, _READ_BYTES))
                number += chunk.count(b"\n")
            number += not chunk.endswith(b"\n")
        return f"{self.file.name}, line {number}"


def jsonl_parts(file: SourceFile, text: TextOf) -> list[JsonLines]:
    """Returns the parts of a file."""
    size = file.content.size_bytes
    if file.compression:
        return [JsonLines(file, text, 0, size)]
    return [JsonLines(file, text, start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES)]


def _parse(line: bytes, place: Callable[[], str]) -> dict[str, Any]:
    try:
        record = json.loads(line.rstrip())  # a line break would look like part of a text that is cut short
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place()}: byte {error.start + 1} of the line (0x{error.object[error.start]:02x}) is not UTF-8 "
            f"({error.reason}). Convert the file to UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place()}: not JSON ({error.msg}: column {error.colno}). Each line must be one whole JSON object."
        ) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, nesting without end
        raise DataError(f"{place()}: JSON that Python does not read ({error}).") from None
    if not isinstance(record, dict):
        raise DataError(f"{place()}: a JSON {type(record).__name__}, not an object.")
    if _SURROGATE.search(line) and _has_lone_surrogate(record):
        raise DataError(f"{place()}: holds half of a surrogate pair (\\ud800 to \\udfff), which is not text.")
    return record


def _has_lone_surrogate(record: dict[str, Any]) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
