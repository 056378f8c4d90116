"""Tables: Parquet and Arrow IPC files, whose rows are documents, read a few rows at a time.

A Parquet file is cut into parts at row groups, an Arrow file at record batches; an Arrow stream (what Hugging Face
`datasets` keeps) has no index of its batches and is one part. Only the columns asked for are read.
"""

import contextlib
import functools
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from titan_data.errors import DataError, import_extra
from titan_data.records import TextOf
from titan_data.source import Piece, ReadCounts, Record
from titan_data.source_file import PART_BYTES, SourceFile

# As Python objects at a time.
_ROWS = 64
_ARROW_FILE = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

Layout = Literal["parquet", "arrow file", "arrow stream"]


@dataclass(frozen=True)
class Rows:
    """Consecutive row groups or record batches of a table."""

    file: SourceFile
    text: TextOf
    layout: Layout
    groups: range
    """Which row groups (Parquet) or record batches (Arrow files); an Arrow stream's part is all of it."""
    first_row: int
    size_bytes: int

    def pieces(self, counts: ReadCounts) -> Iterator[Piece]:
        """Yields the rows' texts.

        Raises:
            DataError: for a table that is damaged or lacks a column, or a row without text.
        """
        for record in self._records(tuple(dict.fromkeys(self.text.fields))):
            yield from self.text.pieces(record)

    def records(self) -> Iterator[Record]:
        """Yields the rows with all their columns.

        Raises:
            DataError: for a table that is damaged.
        """
        return self._records(None)

    def _records(self, columns: tuple[str, ...] | None) -> Iterator[Record]:
        number = self.first_row
        with _readable(self.file, self.layout):
            for batch in self._batches(columns):
                for start in range(0, batch.num_rows, _ROWS):
                    for fields in self._python(batch.slice(start, _ROWS), number):
                        place = functools.partial("{}, row {}".format, self.file.name, number)
                        yield Record(fields, place)
                        number += 1
        self.file.content.check_unchanged()

    def _batches(self, columns: tuple[str, ...] | None) -> Iterator[Any]:
        path = self.file.content.local()
        if self.layout == "parquet":
            with _parquet().ParquetFile(path, memory_map=True, page_checksum_verification=True) as table:
                self._check_columns(columns, table.schema_arrow.names)
                groups = list(self.groups)
                yield from table.iter_batches(_ROWS, row_groups=groups, columns=columns, use_threads=False)
            return
        pyarrow = _pyarrow()
        with pyarrow.memory_map(str(path)) as file:
            if self.layout == "arrow file":
                reader = pyarrow.ipc.open_file(file)
                batches = (reader.get_batch(index) for index in self.groups)
            else:
                batches = reader = pyarrow.ipc.open_stream(file)
            self._check_columns(columns, reader.schema.names)
            for batch in batches:
                yield batch if columns is None else batch.select(list(columns))

    def _check_columns(self, columns: tuple[str, ...] | None, present: list[str]) -> None:
        missing = [column for column in columns or () if column not in present]
        if missing:
            raise DataError(
                f"{self.file.name}: no column {missing[0]!r}; it has {', '.join(map(repr, present)) or 'none'}. Name "
                "the column that holds the text with data.text_field, or several with data.template."
            )

    def _python(self, batch: Any, first: int) -> list[dict[str, Any]]:
        try:
            return batch.to_pylist()
        except UnicodeDecodeError as error:
            for row in range(batch.num_rows):
                try:
                    batch.slice(row, 1).to_pylist()
                except UnicodeDecodeError:
                    first += row
                    break
            raise DataError(f"{self.file.name}, row {first}: text that is not UTF-8 ({error.reason}).") from None


def parquet_parts(file: SourceFile, text: TextOf) -> list[Rows]:
    """Returns the parts of a Parquet file.

    Raises:
        DataError: if it is not whole.
    """
    with _readable(file, "parquet"), _parquet().ParquetFile(file.content.local()) as table:
        groups = [table.metadata.row_group(index) for index in range(table.metadata.num_row_groups)]
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    return _parts(file, text, "parquet", sizes)


def arrow_parts(file: SourceFile, text: TextOf) -> list[Rows]:
    """Returns the parts of an Arrow IPC file or stream.

    Raises:
        DataError: if it is not whole.
    """
    pyarrow = _pyarrow()
    path, size = file.content.local(), file.content.size_bytes
    with path.open("rb") as raw:
        magic = raw.read(len(_ARROW_FILE))
        raw.seek(max(0, size - len(_END_OF_STREAM)))
        end = raw.read()
    if magic != _ARROW_FILE:
        if end != _END_OF_STREAM:
            raise DataError(f"{file.name} is not a whole Arrow file: its end is missing. Write or fetch it again.")
        return [Rows(file, text, "arrow stream", range(0), 0, size)]
    with _readable(file, "arrow file"), pyarrow.memory_map(str(path)) as mapped:
        reader = pyarrow.ipc.open_file(mapped)
        batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        sizes = [(batch.num_rows, batch.nbytes) for batch in batches]
    return _parts(file, text, "arrow file", sizes)


def _parts(file: SourceFile, text: TextOf, layout: Layout, sizes: list[tuple[int, int]]) -> list[Rows]:
    """Consecutive groups, given as (rows, bytes), put together up to `PART_BYTES`."""
    parts: list[Rows] = []
    start = first_row = rows = size = 0
    for index, (group_rows, group_bytes) in enumerate(sizes):
        rows += group_rows
        size += group_bytes
        if size >= PART_BYTES or index == len(sizes) - 1:
            parts.append(Rows(file, text, layout, range(start, index + 1), first_row, size))
            start, first_row, rows, size = index + 1, first_row + rows, 0, 0
    return parts


@contextlib.contextmanager
def _readable(file: SourceFile, layout: Layout) -> Generator[None]:
    """Turns what pyarrow says of a damaged file into an error that names it."""
    errors = (_pyarrow().ArrowException, OSError)
    try:
        yield
    except DataError:
        raise
    except errors as error:
        what = "Parquet" if layout == "parquet" else "Arrow"
        raise DataError(f"{file.name} is not a whole {what} file ({error}). Write or fetch it again.") from error


def _pyarrow() -> Any:
    import_extra("pyarrow.ipc", extra="parquet", purpose="reading Parquet and Arrow files")
    return import_extra("pyarrow", extra="parquet", purpose="reading Parquet and Arrow files")


def _parquet() -> Any:
    return import_extra("pyarrow.parquet", extra="parquet", purpose="reading Parquet and Arrow files")
