"""The manifest: the last file written into a checkpoint, which says what the checkpoint consists of.

A folder without a readable manifest is not a checkpoint. The manifest lists every file with its size and the
SHA-256 of the bytes that were handed to the operating system, and carries a hash of itself. Assumes that the
files lie beside it, under the names it gives (POSIX paths relative to its folder).
"""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from titan_ckpt.errors import CheckpointError, DamagedCheckpointError
from titan_ckpt.location import Location, place_of
from titan_ckpt.place import Place
from titan_ckpt.storage import FileRecord

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1

_READING_THREADS = 8  # more than one so that disks with queues and network file systems are kept busy


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint consists of."""

    step: int
    """Optimizer steps taken."""

    world_size: int
    """Ranks that wrote it: per-rank state can be restored only on as many."""

    state: tuple[str, ...]
    """Names of the saved objects: the first component of every tensor's and value's key."""

    per_rank: tuple[str, ...]
    """Names of the objects of which every rank saved its own."""

    meta: Mapping[str, Json]
    """What the caller wanted to remember: fingerprint, tokens, …"""

    versions: Mapping[str, str]
    """Versions of the packages that wrote it."""

    files: Mapping[str, FileRecord]
    """Every file of the checkpoint but the manifest itself."""

    permanent: bool = False
    """Whether no later save may retire it."""

    def to_bytes(self) -> bytes:
        """The text of `manifest.json`."""
        body: dict[str, Any] = {
            "format": "titan-ckpt",
            "format_version": FORMAT_VERSION,
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "files": {name: dataclasses.asdict(record) for name, record in sorted(self.files.items())},
        }
        return json.dumps({**body, "sha256": _digest(body)}, indent=2).encode()

    @classmethod
    def read(cls, folder: Location) -> "Manifest":
        """Reads `manifest.json` in a folder.

        Raises:
            DamagedCheckpointError: if it is missing, unreadable, or not what was written.
            CheckpointError: if a later version of this package wrote it.
        """
        try:
            body = json.loads(place_of(folder).read(MANIFEST_NAME))
        except FileNotFoundError:
            raise DamagedCheckpointError(folder, [f"{MANIFEST_NAME} is missing"]) from None
        except (OSError, ValueError) as error:
            raise DamagedCheckpointError(folder, [f"{MANIFEST_NAME} cannot be read ({error})"]) from error
        if not isinstance(body, dict) or body.pop("sha256", None) != _digest(body):
            raise DamagedCheckpointError(folder, [f"{MANIFEST_NAME} is not what was written"])
        if body["format_version"] > FORMAT_VERSION:
            raise CheckpointError(
                f"The checkpoint {folder} has format version {body['format_version']}, and this titan-ckpt reads "
                f"up to {FORMAT_VERSION}. Upgrade titan-ckpt to read it."
            )
        return cls(
            step=body["step"],
            world_size=body["world_size"],
            state=tuple(body["state"]),
            per_rank=tuple(body["per_rank"]),
            meta=body["meta"],
            versions=body["versions"],
            permanent=body["permanent"],
            files={name: FileRecord(**record) for name, record in body["files"].items()},
        )

    def damage(
        self,
        folder: Location,
        *,
        hashes: bool,
        names: Iterable[str] | None = None,
        progress: Callable[[int], object] = lambda size: None,
    ) -> list[str]:
        """What is wrong with the files in `folder`, one sentence each; empty if it is whole.

        Args:
            folder: where the files are.
            hashes: read every file and compare its SHA-256; otherwise only sizes are compared.
            names: the files to look at; all of them if None.
            progress: called with the bytes of each file that has been looked at, from several threads.
        """
        place = place_of(folder)
        sizes = place.files()

        def problem(name: str) -> str | None:
            found = _file_damage(place, name, sizes.get(name), self.files[name], hashes)
            progress(self.files[name].size)
            return found and f"{name} {found}"

        with ThreadPoolExecutor(min(_READING_THREADS, os.cpu_count() or 1)) as threads:
            return [found for found in threads.map(problem, self.files if names is None else names) if found]


def _file_damage(place: Place, name: str, size: int | None, record: FileRecord, hashes: bool) -> str | None:
    if size is None:
        return "is missing"
    if size != record.size:
        return f"has {size:,} bytes instead of {record.size:,}"
    if not hashes:
        return None
    try:
        with place.open(name) as file:
            if hashlib.file_digest(cast(io.BytesIO, file), "sha256").hexdigest() != record.sha256:
                return "has other bytes than were written (its SHA-256 differs)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return None


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
