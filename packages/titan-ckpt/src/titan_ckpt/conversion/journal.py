"""What an interrupted conversion has finished, so that it can be continued.

Beside the files that are being written lies a folder with the *plan*, a fingerprint of all that the result follows
from, and one note for each finished file. Only files whose bytes still have the noted hash are kept.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from titan_ckpt.formats.streams import create, file_hash
from titan_ckpt.manifest import Json
from titan_ckpt.place import Place
from titan_ckpt.storage import FileRecord

FOLDER = "titan-convert.partial"
_PLAN_NAME = "plan.json"


@dataclass(frozen=True)
class Written:
    """A file of the result that is finished."""

    record: FileRecord
    """Its size and hash."""

    notes: Json
    """What its writer wanted to remember: where in it things are."""


class Journal:
    """The notes of one conversion, in the folder where its files are written."""

    def __init__(self, work: Place, fingerprint: Mapping[str, Json]) -> None:
        self._work, self._folder = work, work / FOLDER
        self._plan = json.dumps(fingerprint, sort_keys=True).encode()

    def exists(self) -> bool:
        """Whether somebody has begun a conversion here."""
        return _PLAN_NAME in self._folder.files()

    def is_ours(self) -> bool:
        """Whether it was this one, from the same source with the same options."""
        try:
            return self._folder.read(_PLAN_NAME) == self._plan
        except FileNotFoundError:
            return False

    def begin(self) -> None:
        """Notes the plan."""
        _write(self._folder, _PLAN_NAME, self._plan)

    def note(self, name: str, written: Written) -> None:
        """Notes that a file is finished."""
        _write(self._folder, f"{name}.json", json.dumps(dataclasses.asdict(written)).encode())

    def finished(self, name: str) -> Written | None:
        """The note of a file, if its bytes are those that were written."""
        try:
            note = json.loads(self._folder.read(f"{name}.json"))
            written = Written(FileRecord(**note["record"]), note["notes"])
            if self._work.size(name) != written.record.size:
                return None
            whole = file_hash(self._work, name) == written.record.sha256
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None  # there is none, or it was being written when the conversion was killed
        return written if whole else None

    def remove(self) -> None:
        """Forgets everything: the result is complete."""
        self._folder.delete()


def _write(folder: Place, name: str, content: bytes) -> None:
    with create(folder, name) as file:
        file.write(content)
