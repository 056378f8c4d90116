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
from titan_ckpt.manifest import Json, Manifest
from titan_ckpt.world import RanksFailedError, World


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint, as `Checkpointer.newest_whole` or `open_checkpoint` has found it."""

    path: Path
    """Its folder."""

    manifest: Manifest
    """What it consists of and who wrote it."""

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
                f"The checkpoint {self.path} has no file {name!r}; it has {', '.join(self.files) or 'none'}."
            )
        return self._read(f"{FILES_FOLDER}/{name}")

    def read_values(self) -> dict[str, Any]:
        """What is not a tensor, by key: the content of `state.json`."""
        return json.loads(self._read(STATE_NAME))

    def _read(self, name: str) -> bytes:
        try:
            content = (self.path / name).read_bytes()
        except OSError as error:
            raise DamagedCheckpointError(self.path, [f"{name} cannot be read ({error})"]) from error
        if hashlib.sha256(content).hexdigest() != self.manifest.files[name].sha256:
            raise DamagedCheckpointError(self.path, [f"{name} has other bytes than were written"])
        return content


def open_checkpoint(path: Path, *, verify_hashes: bool = True) -> Checkpoint:
    """Opens a checkpoint folder and verifies it; in a distributed world every rank calls and reads a share.

    Args:
        path: a folder that holds a `manifest.json`.
        verify_hashes: read every file and compare its SHA-256; otherwise only sizes are compared.

    Raises:
        DamagedCheckpointError: on every rank alike, naming each file that is not what was written.
        CheckpointError: if it cannot be read at all.
    """
    world = World()
    try:
        manifest, problems = world.first(lambda: _manifest(path))
        if manifest is not None:
            names = sorted(manifest.files)[world.rank :: world.size]
            own = world.together(lambda: manifest.damage(path, hashes=verify_hashes, names=names))
            problems = [problem for found in world.gather(own) for problem in found]
    except RanksFailedError as failed:
        raise CheckpointError(f"The checkpoint {path} could not be opened: {failed}") from failed
    if manifest is None or problems:
        raise DamagedCheckpointError(path, problems)
    return Checkpoint(path=path, manifest=manifest)


def _manifest(path: Path) -> tuple[Manifest | None, list[str]]:
    """The manifest, or what is wrong with it."""
    try:
        manifest = Manifest.read(path)
    except DamagedCheckpointError as damaged:
        return None, list(damaged.problems)
    step = step_of(path)
    if step is not None and step != manifest.step:
        return None, [f"its folder has the name of step {step}, its manifest is of step {manifest.step}"]
    return manifest, []
