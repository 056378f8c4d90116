"""Cutting documents into pieces of bounded size, so that memory stays flat whatever a document's size.

A long document comes in pieces of at most `PIECE_CHARS` characters, cut where it makes no difference to the tokens:
after a line break between two characters that are no white space, or before a space and something that is none. There
the pattern of every common byte-level BPE (GPT-2, cl100k, Llama 3, Qwen) has a border of its own, with or without the
rest of the text. Only text without such a place for 64 thousand characters is cut anywhere, and a tokenizer that marks
the beginning of its input (SentencePiece's) marks each piece's.
"""

from collections.abc import Iterable, Iterator

from titan_data.source import Piece

PIECE_CHARS = 1 << 16


def pieces_of(text: str) -> Iterator[Piece]:
    """Yields one document's text."""
    if len(text) <= PIECE_CHARS:
        yield Piece(text, ends_document=True)
    else:
        yield from pieces_of_chunks([text])


def pieces_of_chunks(chunks: Iterable[str]) -> Iterator[Piece]:
    """Yields one document's text, which arrives in chunks; how it was cut makes no difference."""
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


def grouped(pieces: Iterable[Piece], characters: int) -> Iterator[list[Piece]]:
    """Yields consecutive pieces together, so many that they have at least so many characters, or what is left."""
    group: list[Piece] = []
    gathered = 0
    for piece in pieces:
        group.append(piece)
        gathered += len(piece.text)
        if gathered >= characters:
            yield group
            group, gathered = [], 0
    if group:
        yield group


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
