"""A folder in an object store, by any fsspec implementation that is installed.

Folders exist there only as the common beginning of files' names, and nothing can be renamed. Assumes a store that shows
a new file to everybody once it is written, and never before, as S3, GCS and the Hugging Face hub do.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from titan_ckpt.errors import CheckpointError
from titan_ckpt.place import Place
from titan_ckpt.storage import HashingFile

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hf"}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "HF_TOKEN",
}
# By name, since importing their packages would cost a second: what providers raise when nobody is logged in.
_NOT_LOGGED_IN = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "DefaultCredentialsError",
    "RefreshError",
    "LocalTokenNotFoundError",
}
_SEND_BYTES = 1 << 24  # handed to a remote file at a time: what it buffers stays small beside a tensor


@dataclass(frozen=True)
class RemotePlace(Place):
    """A folder under a URL that fsspec knows."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def path(self) -> None:
        """None: it is not on this machine."""
        return None

    @property
    def name(self) -> str:
        """The last component."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "RemotePlace":
        """The folder that this one is in; that of a bucket is itself."""
        above = self.url.rpartition("/")[0]
        return self if above.endswith("/") else RemotePlace(above)

    def __truediv__(self, name: str) -> "RemotePlace":
        return RemotePlace(f"{self.url}/{name}")

    def exists(self) -> bool:
        """Whether a file has this name, or a name that begins with it."""
        with self._reached() as (system, path):
            return system.exists(path)

    def files(self) -> dict[str, int]:
        """Every file below with its bytes."""
        with self._reached() as (system, path):
            try:
                found = cast(dict[str, Any], system.find(path, detail=True))
            except FileNotFoundError as error:
                _refuse_missing_bucket(self, error)
                return {}
        start = f"{path.rstrip('/')}/"
        below = {name: info["size"] for name, info in sorted(found.items()) if name.startswith(start)}
        return {name.removeprefix(start): size for name, size in below.items()}

    def folders(self) -> list[str]:
        """Names of the folders directly below."""
        with self._reached() as (system, path):
            try:
                found = system.ls(path, detail=True)
            except FileNotFoundError as error:
                _refuse_missing_bucket(self, error)
                return []
        return sorted(info["name"].rstrip("/").rpartition("/")[2] for info in found if info["type"] == "directory")

    def size(self, name: str) -> int:
        """Bytes of a file."""
        with self._reached() as (system, path):
            info = system.info(f"{path}/{name}")
            if info["type"] != "file":
                raise FileNotFoundError(f"{self}/{name} is not a file")
            return cast(int, info["size"])

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """A file's content, or a part of it; one request."""
        if size == 0:
            return b""
        with self._reached() as (system, path):
            if offset == 0 and size is None:
                return cast(bytes, system.cat_file(f"{path}/{name}"))
            end = None if size is None else offset + size
            return cast(bytes, system.cat_file(f"{path}/{name}", start=offset, end=end))

    def open(self, name: str) -> BinaryIO:
        """A file for reading, a few MB ahead at a time."""
        with self._reached() as (system, path):
            return cast(BinaryIO, _RemoteInput(self, system.open(f"{path}/{name}", "rb")))

    def create(self, name: str, on_write: Callable[[int], object] = lambda size: None) -> HashingFile:
        """A new file."""
        with self._reached() as (system, path):
            return HashingFile(_RemoteOutput(self / name, system.open(f"{path}/{name}", "wb")), on_write)

    def remove(self, name: str) -> None:
        """Deletes a file."""
        with self._reached() as (system, path), contextlib.suppress(FileNotFoundError):
            system.rm_file(f"{path}/{name}")

    def delete(self) -> None:
        """Deletes everything below."""
        with self._reached() as (system, path), contextlib.suppress(FileNotFoundError):
            system.rm(path, recursive=True)

    @contextlib.contextmanager
    def _reached(self) -> Iterator[tuple["AbstractFileSystem", str]]:
        """The file system and the path in it, for one request whose errors are translated."""
        from fsspec.core import url_to_fs  # tenths of a second that a run on a disk does not pay

        try:
            system, path = url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            protocol = self.url.partition(":")[0]
            remedy = f"install titan-ckpt[{_EXTRAS[protocol]}]" if protocol in _EXTRAS else "check the URL"
            raise CheckpointError(f"{self} cannot be reached: {error}. To go on, {remedy}.") from error
        system.invalidate_cache()  # other processes write here too
        with _translated(self):
            yield system, path


class _RemoteInput(io.RawIOBase):
    """A remote file for reading that raises what a local one would."""

    def __init__(self, place: Place, file: Any) -> None:
        super().__init__()
        self._place, self._file = place, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        with _translated(self._place):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        with _translated(self._place):
            return self._file.read()

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _RemoteOutput:
    """Where the bytes of a remote file go; it appears when it is finished."""

    def __init__(self, place: Place, file: Any) -> None:
        self.name = str(place)
        self._place, self._file = place, file

    def write(self, view: memoryview) -> int:
        with _translated(self._place):
            return self._file.write(view[:_SEND_BYTES])

    def finish(self) -> None:
        try:
            with _translated(self._place):
                self._file.close()
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        # Whatever goes wrong now, the file has not appeared; only the parts sent so far may be left to the provider.
        with contextlib.suppress(Exception):
            self._file.discard()
        with contextlib.suppress(AttributeError):  # of a file that is not buffered, and so was there from the start
            self._file.closed = True  # else fsspec would publish it when it is collected


@contextlib.contextmanager
def _translated(place: Place) -> Iterator[None]:
    """Makes what a provider's library raises an OSError, or a CheckpointError where the user can do something."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        _refuse_missing_bucket(place, error)
        raise
    except OSError:
        raise
    except Exception as error:
        if type(error).__name__ in _NOT_LOGGED_IN:
            protocol = _EXTRAS.get(str(place).partition(":")[0], "")
            remedy = f"set {_CREDENTIALS[protocol]}" if protocol in _CREDENTIALS else "log in to the provider"
            raise CheckpointError(f"{place} cannot be reached: {error}. To go on, {remedy}.") from error
        raise OSError(f"{place}: {type(error).__name__}: {error}") from error


def _refuse_missing_bucket(place: Place, error: FileNotFoundError) -> None:
    if "bucket does not exist" in str(error):  # S3 and GCS say so in the same words
        raise CheckpointError(
            f"{place} cannot be reached: its bucket doesn't exist. Make it, or correct it."
        ) from error
