"""One file of a source: where its bytes are, what they should be, and how they are unpacked.

Compressed files (.gz, .zst) are read as what is in them; one that ends before its compressed stream does is an error.
"""

import contextlib
import gzip
import io
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Protocol, cast

from titan_data.errors import DataError, import_extra

COMPRESSIONS = (".gz", ".zst")

# Of an uncompressed file of lines, or of row groups, that is read by one process at a time.
PART_BYTES = 1 << 25
_READ_BYTES = 1 << 20


class Content(Protocol):
    """The bytes of a file, as they were when they were hashed."""

    @property
    def size_bytes(self) -> int:
        """How many."""
        ...

    @property
    def sha256(self) -> str:
        """Their hash, in hexadecimal."""
        ...

    def local(self) -> Path:
        """Returns a file of this machine that holds them, fetching it first if need be."""
        ...

    def check_unchanged(self) -> None:
        """Raises DataError if the file is no longer the one that was hashed."""
        ...


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, in this process or any other."""

    name: str
    """Its path or URL, for messages."""
    content: Content

    @property
    def compression(self) -> str:
        """The suffix of its compression, or nothing."""
        return compression(self.name)

    @contextlib.contextmanager
    def open(self) -> Generator[BinaryIO]:
        """Opens its unpacked bytes.

        Raises:
            DataError: if it cannot be read or unpacked, is cut short, or has changed when the block is left.
        """
        try:
            if self.compression and not self.content.size_bytes:
                raise EOFError("it has no bytes")  # which the libraries take for no content
            with self.content.local().open("rb") as raw, _unpacked(raw, self.compression) as file:
                yield file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{self.name} is not a whole {self.compression} file ({error}). Fetch or compress it again."
            ) from error
        except DataError:
            raise
        except OSError as error:
            raise DataError(
                f"cannot read {self.name}: {error.strerror or error}. Check the file and its disk."
            ) from error
        self.content.check_unchanged()


def compression(name: str) -> str:
    """Returns ".gz" or ".zst" if a file's name ends so, else nothing."""
    suffix = PurePath(name).suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def kind(name: str) -> str:
    """Returns the suffix that says what is in a file, in lower case, without that of its compression."""
    path = PurePath(name)
    return (path.with_suffix("") if compression(name) else path).suffix.lower()


@contextlib.contextmanager
def _unpacked(raw: BinaryIO, suffix: str) -> Generator[BinaryIO]:
    if suffix == ".gz":
        with gzip.GzipFile(fileobj=raw) as file:
            yield cast(BinaryIO, file)
    elif suffix == ".zst":
        yield io.BufferedReader(_ZstdFile(raw), _READ_BYTES)
    else:
        yield raw


class _ZstdFile(io.RawIOBase):
    """Unpacks all frames of a .zst file; unlike the library's own reader, it notices when the last one is cut short."""

    def __init__(self, raw: BinaryIO) -> None:
        self._zstandard = import_extra("zstandard", extra="zstd", purpose="reading .zst files")
        self._chunks = self._unpack(raw)
        self._chunk = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._chunk:
            self._chunk = next(self._chunks, b"")
        count = min(len(buffer), len(self._chunk))
        buffer[:count] = self._chunk[:count]
        self._chunk = self._chunk[count:]
        return count

    def _unpack(self, raw: BinaryIO) -> Iterator[bytes]:
        unpacker = None
        try:
            while chunk := raw.read(_READ_BYTES):
                while chunk:
                    unpacker = unpacker or self._new_frame()
                    if unpacked := unpacker.decompress(chunk):
                        yield unpacked
                    chunk = unpacker.unused_data
                    if unpacker.eof:
                        unpacker = None
        except self._zstandard.ZstdError as error:
            raise zlib.error(str(error)) from error
        if unpacker is not None:
            raise EOFError("it ends within a frame")

    def _new_frame(self) -> Any:
        return self._zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
