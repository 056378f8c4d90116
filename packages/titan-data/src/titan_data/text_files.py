"""Text files: each is one document, read as UTF-8 in bounded memory."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass

from titan_data.errors import DataError
from titan_data.pieces import pieces_of_chunks
from titan_data.source import Piece, ReadCounts
from titan_data.source_file import SourceFile

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class TextFile:
    """The part of a source that is one text file, without the byte order mark it may begin with."""

    file: SourceFile
    skip_undecodable: bool = False
    """Leave the file out if it is not UTF-8, and count it, instead of refusing it; meant for small files."""

    @property
    def size_bytes(self) -> int:
        """The size of the file."""
        return self.file.content.size_bytes

    def pieces(self, counts: ReadCounts) -> Iterator[Piece]:
        """Yields the text, one document.

        Raises:
            DataError: at the first byte that is not UTF-8, naming its place.
        """
        if self.skip_undecodable and not self._is_utf8():
            counts.skipped_files += 1
            return
        yield from pieces_of_chunks(self._decoded())

    def _is_utf8(self) -> bool:
        with self.file.open() as file:
            try:
                file.read().decode("utf-8")
            except UnicodeDecodeError:
                return False
        return True

    def _decoded(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        read, lines, line_start = 0, 1, 0
        with self.file.open() as file:
            while True:
                chunk = file.read(_CHUNK_BYTES)
                try:
                    text = decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    # error.object is this chunk, preceded by the beginning of a character that the last one cut short
                    before = error.object[: error.start]
                    position = read + len(chunk) - len(error.object) + error.start
                    if b"\n" in before:
                        line_start = position - len(before) + before.rindex(b"\n") + 1
                    line = lines + before.count(b"\n")
                    raise DataError(
                        f"{self.file.name}, line {line}: byte {position - line_start + 1} of the line "
                        f"(0x{error.object[error.start]:02x}) is not UTF-8 ({error.reason}). Convert the file to "
                        "UTF-8, or take it out of the corpus."
                    ) from None
                if not chunk:
                    return
                yield text.removeprefix("\ufeff") if read == 0 else text
                if b"\n" in chunk:
                    line_start = read + chunk.rindex(b"\n") + 1
                    lines += chunk.count(b"\n")
                read += len(chunk)
