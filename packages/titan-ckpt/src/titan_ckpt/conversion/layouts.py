"""What each format of the result consists of beside its large files, in the order in which it is written."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from titan_ckpt import __version__, dcp
from titan_ckpt.contents import FILES_FOLDER, STATE_NAME
from titan_ckpt.conversion.journal import Written
from titan_ckpt.conversion.plan import PlannedFile
from titan_ckpt.errors import CheckpointError
from titan_ckpt.formats.collection import Tensors, listed
from titan_ckpt.formats.dcp_folder import Part, metadata_bytes, write_parts
from titan_ckpt.manifest import MANIFEST_NAME, Json, Manifest
from titan_ckpt.place import Place
from titan_ckpt.storage import FileRecord

SEAL_NAME = "titan-convert.json"
_SEAL_FORMAT = "titan-convert"
VERSIONS: Mapping[str, str] = {"titan-ckpt": __version__, "torch": str(torch.__version__)}


@dataclass(frozen=True, kw_only=True)
class CheckpointLayout:
    """A checkpoint folder: DCP's metadata, values, files, and the manifest last."""

    tensors: Tensors
    shared: Mapping[str, str] = field(default_factory=dict)
    """Further keys of the same tensors."""

    parts: Mapping[str, Sequence[Part]]
    """What goes into each data file."""

    under: str | None
    """The object that all keys begin with, if there is one."""

    step: int
    values: Mapping[str, Json] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    meta: Mapping[str, Json] = field(default_factory=dict)

    def data_files(self) -> list[PlannedFile]:
        """The large files."""

        def planned(name: str) -> PlannedFile:
            parts = self.parts[name]
            size = sum(self.tensors[part.key].nbytes_of(part.stop - part.start) for part in parts)
            return PlannedFile(name, size, lambda file: write_parts(file, self.tensors, parts))

        return [planned(name) for name in self.parts]

    def small_files(self, written: Mapping[str, Written]) -> Mapping[str, bytes]:
        """Metadata, values, and what goes with the model."""
        places = {name: cast("Sequence[Sequence[int]]", written[name].notes) for name in self.parts}
        metadata = metadata_bytes(self.tensors, self.shared, self.parts, places, self.under)
        values = json.dumps(self.values, indent=1).encode()
        files = {f"{FILES_FOLDER}/{name}": content for name, content in self.files.items()}
        return {dcp.METADATA_NAME: metadata, STATE_NAME: values, **files}

    def seal(self, records: Mapping[str, FileRecord], proof: Mapping[str, Json]) -> tuple[str, bytes]:
        """The manifest."""
        keys = [*self.tensors, *self.shared, *self.values]
        manifest = Manifest(
            step=self.step,
            world_size=1,
            state=tuple(sorted({key.partition(".")[0] for key in keys})),
            per_rank=(),
            meta={**self.meta, **proof},
            versions=VERSIONS,
            files=records,
        )
        return MANIFEST_NAME, manifest.to_bytes()

    def kept(self, place: Place) -> str | None:
        """None for a checkpoint of ours, whole or not, with nothing else in it."""
        try:
            return _strangers(place, MANIFEST_NAME, Manifest.read(place).files)
        except CheckpointError:
            return f"is not a checkpoint with a {MANIFEST_NAME} that can be read"


@dataclass(frozen=True, kw_only=True)
class SealedLayout:
    """A folder of somebody else's format, to which one file is added: what it was made from, sizes and hashes."""

    files: Mapping[str, bytes]
    meta: Mapping[str, Json] = field(default_factory=dict)

    def small_files(self, written: Mapping[str, Written]) -> Mapping[str, bytes]:
        """Configuration, tokenizer, index."""
        return self.files

    def seal(self, records: Mapping[str, FileRecord], proof: Mapping[str, Json]) -> tuple[str, bytes]:
        """Everything that was written, with its hash."""
        body: dict[str, Any] = {
            "format": _SEAL_FORMAT,
            "versions": VERSIONS,
            "meta": {**self.meta, **proof},
            "files": {name: [record.size, record.sha256] for name, record in sorted(records.items())},
        }
        return SEAL_NAME, (json.dumps(body, indent=2) + "\n").encode()

    def kept(self, place: Place) -> str | None:
        """None for what was converted before, with nothing else in it."""
        try:
            return _strangers(place, SEAL_NAME, sealed_hashes(place))
        except (OSError, ValueError):
            return f"is not a result of titan-convert with a {SEAL_NAME} that can be read"


def sealed_hashes(place: Place) -> dict[str, str]:
    """The SHA-256 of each file that a conversion has written into somebody else's format.

    Raises:
        FileNotFoundError: if there is no seal.
        ValueError: if it is not one of ours.
    """
    body = json.loads(place.read(SEAL_NAME))
    try:
        if body["format"] != _SEAL_FORMAT:
            raise ValueError(f"{SEAL_NAME} is not of titan-convert")
        return {name: digest for name, (_, digest) in body["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{SEAL_NAME} is not what was written") from error


def _strangers(place: Place, index: str, files: Collection[str]) -> str | None:
    others = place.files().keys() - {*files, index}
    return f"holds files that its {index} doesn't list: {listed(sorted(others))}" if others else None
