"""A published checkpoint: where it is, what its manifest says, and the small files that came with it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_ckpt.contents import FILES_FOLDER, STATE_NAME
from titan_ckpt.directory import step_of
from titan_ckpt.errors import CheckpointError, DamagedCheckpointError
from titan_ckpt.location import Location, place_of
from titan_ckpt.manifest import Json, Manifest
from titan_ckpt.place import Place
from titan_ckpt.world import RanksFailedError, World


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint, as `Checkpointer.newest_whole` or `open_checkpoint` has found it."""

    place: Place
    """Its folder."""

    manifest: Manifest
    """What it consists of and who wrote it."""

    @property
    def path(self) -> Path | None:
        """Its folder on this machine; None if it is remote."""
        return self.place.path

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was saved."""
        return self.manifest.step

    @property
    def meta(self) -> Mapping[str, Json]:
        """What the caller of `save` wanted to remember."""
        return self.manifest.meta

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that the caller of `save` added."""
        start = f"{FILES_FOLDER}/"
        return tuple(name.removeprefix(start) for name in self.manifest.files if name.startswith(start))

    def read_file(self, name: str) -> bytes:
        """The content of one of `files`.

        Raises:
            CheckpointError: if there is no such file.
            DamagedCheckpointError: if its content is not what was written.
        """
        if name not in self.files:
            raise CheckpointError(
                f"The checkpoint {self.place} has no file {name!r}; it has {', '.join(self.files) or 'none'}."
            )
        return self._read(f"{FILES_FOLDER}/{name}")

    def read_values(self) -> dict[str, Any]:
        """What is not a tensor, by key: the content of `state.json`."""
        return json.loads(self._read(STATE_NAME))

    def _read(self, name: str) -> bytes:
        try:
            content = self.place.read(name)
        except OSError as error:
            raise DamagedCheckpointError(self.place, [f"{name} cannot be read ({error})"]) from error
        if hashlib.sha256(content).hexdigest() != self.manifest.files[name].sha256:
            raise DamagedCheckpointError(self.place, [f"{name} has other bytes than were written"])
        return content


def open_checkpoint(location: Location, *, verify_hashes: bool = True, world: World | None = None) -> Checkpoint:
    """Opens a checkpoint folder and verifies it; in a distributed world every rank calls and reads a share.

    Args:
        location: a folder that holds a `manifest.json`, or the URL of one.
        verify_hashes: read every file and compare its SHA-256; otherwise only sizes are compared.
        world: the ranks that call; by default those of the default process group, if there is one.

    Raises:
        DamagedCheckpointError: on every rank alike, naming each file that is not what was written.
        CheckpointError: if it cannot be read at all.
    """
    world, place = world or World(), place_of(location)
    try:
        manifest, problems = world.first(lambda: _manifest(place))
        if manifest is not None:
            names = sorted(manifest.files)[world.rank :: world.size]
            own = world.together(lambda: manifest.damage(place, hashes=verify_hashes, names=names))
            problems = [problem for found in world.gather(own) for problem in found]
    except RanksFailedError as failed:
        raise CheckpointError(f"The checkpoint {place} could not be opened: {failed}") from failed
    if manifest is None or problems:
        raise DamagedCheckpointError(place, problems)
    return Checkpoint(place=place, manifest=manifest)


def _manifest(place: Place) -> tuple[Manifest | None, list[str]]:
    """The manifest, or what is wrong with it."""
    try:
        manifest = Manifest.read(place)
    except DamagedCheckpointError as damaged:
        return None, list(damaged.problems)
    step = step_of(place.name)
    if step is not None and step != manifest.step:
        return None, [f"its folder has the name of step {step}, its manifest is of step {manifest.step}"]
    return manifest, []
