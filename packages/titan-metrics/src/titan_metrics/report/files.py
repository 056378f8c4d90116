"""Reading a run's JSON and JSONL files, also while a run writes to them.

A line that a killed process left unfinished is no mistake: it is skipped if it is the file's last, or if the next line
is one with which a restarted process begins. Anything else that is not a JSON object is an error with file and line.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from titan_metrics.jsonl import DamagedFileError, whole_lines


class ReportError(RuntimeError):
    """A run directory cannot be read, or a page cannot be written or served; the message is for the user."""


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in the file at `path`; None if there is no such file.

    Raises:
        ReportError: if it cannot be read or is no JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise ReportError(
            f"{path} is not JSON ({error}). Mend it, or move it away: the page then says that it is missing."
        ) from error
    if not isinstance(value, dict):
        raise ReportError(f"{path} holds a JSON {type(value).__name__}; expected an object. Mend it, or move it away.")
    return value


def unreadable(path: Path, error: OSError) -> ReportError:
    """The error to raise when the operating system refuses to read `path`."""
    return ReportError(f"Cannot read {path}: {error.strerror}. Check that it exists and that you may read it.")


_DAMAGED = (-1, -1)  # no file's identity: once mended, the file is read from its start


class JsonLines:
    """The objects in a JSONL file that may still grow: `new` gives those since the last call.

    A file that was replaced or has become shorter is read from its start again; `replaced` tells that beforehand, so
    that what was made of the old lines can be thrown away.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._line = 0
        self._identity: tuple[int, int] | None = None

    def exists(self) -> bool:
        """Whether the file is there."""
        return self.path.is_file()

    def replaced(self) -> bool:
        """Whether the file is not the one that was read so far, or no longer holds all that was read."""
        if self._identity is None:
            return False
        try:
            now = self.path.stat()
        except OSError:
            return True
        return (now.st_dev, now.st_ino) != self._identity or now.st_size < self._offset

    def new(self) -> Iterator[dict[str, Any]]:
        """The objects of the lines that were finished since the last call; none if there is no file.

        Raises:
            ReportError: if the file cannot be read, or a line is not a JSON object.
        """
        if self.replaced():
            self._offset, self._line, self._identity = 0, 0, None
        try:
            with self.path.open("rb") as file:
                status = self.path.stat()
                self._identity = (status.st_dev, status.st_ino)
                file.seek(self._offset)
                yield from self._objects(file)
        except FileNotFoundError:
            return
        except OSError as error:
            raise unreadable(self.path, error) from error

    def _objects(self, file: IO[bytes]) -> Iterator[dict[str, Any]]:
        try:
            yield from whole_lines(self._counted(file), self.path, self._line)
        except DamagedFileError as error:
            self._identity = _DAMAGED
            raise damaged(error) from error

    def _counted(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        for line in lines:
            if line.endswith(b"\n"):  # else it is still being written, or torn: read when there is more
                self._offset += len(line)
                self._line += 1
            yield line


def damaged(error: DamagedFileError) -> ReportError:
    """The error to raise for a file with a damaged line."""
    return ReportError(f"{error} The page then says that it is missing.")
