"""Reading documents from files as pieces of bounded size, so that memory stays flat whatever a file's size.

A text file is one document; a line of a JSONL file is one. A long document comes in pieces of at most
`PIECE_CHARS` characters, cut where it makes no difference to the tokens: after a line break between two characters
that are no white space, or before a space and something that is none. There the pattern of every common byte-level
BPE (GPT-2, cl100k, Llama 3, Qwen) has a border of its own, with or without the rest of the text. Only text without
such a place for 64 thousand characters is cut anywhere, and a tokenizer that marks the beginning of its input
(SentencePiece's) marks each piece's.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from titan_data.errors import DataError

PIECE_CHARS = 1 << 16
_CHUNK_BYTES = 1 << 20


class Piece(NamedTuple):
    """A stretch of a document's text."""

    text: str
    ends_document: bool


@dataclass
class ReadCounts:
    """What has been read so far."""

    bytes: int = 0
    skipped_files: int = 0


def read_text(path: Path, counts: ReadCounts) -> Iterator[Piece]:
    """Yields a UTF-8 file's text, one document, without the byte order mark it may begin with.

    Raises:
        DataError: at the first byte that is not UTF-8, naming its place.
    """
    return _pieces(_decoded(path, counts))


def read_jsonl(path: Path, field: str, counts: ReadCounts) -> Iterator[Piece]:
    """Yields the text in one field of each line's JSON object; blank lines do not count.

    Raises:
        DataError: for a line that is not UTF-8, not a JSON object, or has no text in that field.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            counts.bytes += len(line)
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield from _pieces([_field_text(line, field, f"{path}, line {number}")])


def is_utf8(path: Path) -> bool:
    """Returns whether the whole file is UTF-8 text; meant for small files."""
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _decoded(path: Path, counts: ReadCounts) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    read, lines = 0, 1
    with path.open("rb") as file:
        while True:
            chunk = file.read(_CHUNK_BYTES)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                # error.object is this chunk, preceded by the beginning of a character that the last one cut short
                offset = read + len(chunk) - len(error.object) + error.start
                line = lines + error.object[: error.start].count(b"\n")
                raise DataError(
                    f"{path}, line {line}: byte {offset} (0x{error.object[error.start]:02x}) is not UTF-8 "
                    f"({error.reason}). Convert the file to UTF-8, or take it out of the corpus."
                ) from None
            if not chunk:
                return
            yield text.removeprefix("\ufeff") if read == 0 else text
            read += len(chunk)
            lines += chunk.count(b"\n")
            counts.bytes += len(chunk)


def _field_text(line: bytes, field: str, place: str) -> str:
    try:
        record = json.loads(line.rstrip())  # a line break would look like part of a text that is cut short
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: byte {error.start} of the line is not UTF-8 ({error.reason}). Convert the file to UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: not JSON ({error.msg} at column {error.colno}). Each line must be one whole JSON object."
        ) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, nesting without end
        raise DataError(f"{place}: JSON that Python does not read ({error}).") from None
    if not isinstance(record, dict):
        raise DataError(f"{place}: a JSON {type(record).__name__}, not an object with a field {field!r}.")
    if field not in record:
        raise DataError(
            f"{place}: no field {field!r}; the line has {', '.join(map(repr, record)) or 'no fields'}. "
            "Name the field that holds the text with data.text_field."
        )
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{place}: field {field!r} holds a JSON {type(text).__name__}, not text.")
    if b"\\u" in line and any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{place}: field {field!r} holds half of a surrogate pair (\\ud800 to \\udfff), not text.")
    return text


def _pieces(chunks: Iterable[str]) -> Iterator[Piece]:
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > PIECE_CHARS:
            cut = _cut(rest, start, start + PIECE_CHARS)
            yield Piece(rest[start:cut], ends_document=False)
            start = cut
        rest = rest[start:]
    yield Piece(rest, ends_document=True)


def _cut(text: str, start: int, end: int) -> int:
    """The last place to cut in text[start + 1 : end + 1]; `text` is longer than `end`."""
    line_break = end
    while (line_break := text.rfind("\n", start + 1, line_break)) != -1:
        if not text[line_break - 1].isspace() and not text[line_break + 1].isspace():
            return line_break + 1
    space = end
    while (space := text.rfind(" ", start + 1, space)) != -1:
        if not text[space + 1].isspace():
            return space
    return end
