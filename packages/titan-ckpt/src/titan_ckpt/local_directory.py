"""A checkpoint directory on a POSIX file system, where a folder that is complete gets its name in one step.

A checkpoint is written under a scratch name (see `storage`) and renamed: it is whole, or it isn't there under its name.
"""

import re
from pathlib import Path

from titan_ckpt.directory import Directory, attempt_of, is_checkpoint, step_name, step_of
from titan_ckpt.errors import CheckpointError
from titan_ckpt.local_place import LocalPlace
from titan_ckpt.place import Place
from titan_ckpt.storage import SCRATCH_PATTERN, discard, publish, scratch

_SCRATCH = re.compile(rf"(?P<final>step-(?:0|[1-9][0-9]*)(?:\.again-[0-9a-f]{{8}})?)(?:{SCRATCH_PATTERN})+")


class LocalDirectory(Directory):
    """Checkpoints appear by renaming."""

    def candidates(self) -> list[Place]:
        """Folders that may hold a checkpoint, newest first.

        A folder that was being replaced when the run was killed counts, under its `.old-` name, as long as its
        replacement is not there.
        """
        names = self.place.folders()
        found = []
        for name in names:
            replaced = _final_name(name, "old")
            attempt = attempt_of(replaced or name)
            if attempt is not None and replaced not in names:
                found.append((attempt, name))
        return [self.place / name for _, name in sorted(found, reverse=True)]

    def begin(self, step: int) -> Place:
        """Makes the scratch folder in which a checkpoint is written."""
        final = _path(self.place) / step_name(step)
        final.parent.mkdir(parents=True, exist_ok=True)
        self.sweep()
        if final.exists() and not is_checkpoint(final):
            raise CheckpointError(f"{final} is in the way: it is not a checkpoint. Move it elsewhere")
        temporary = scratch(final, "tmp")
        temporary.mkdir()
        return LocalPlace(temporary)

    def publish(self, written: Place, step: int) -> Place:
        """Renames a folder to the name of its step; what had the name, or another one of this step, goes."""
        final = self.place / step_name(step)
        publish(_path(written), _path(final))
        self.sweep()
        for folder in self.candidates():
            if step_of(folder.name) == step and folder != final:
                with self._reported(folder):
                    self.discard(folder)
        return final

    def abandon(self, written: Place) -> None:
        """Deletes a scratch folder."""
        written.delete()

    def discard(self, folder: Place) -> None:
        """Renames a folder, and deletes it then."""
        discard(_path(folder))

    def sweep(self) -> None:
        """Deletes what killed runs have left, and gives a folder that was being replaced its name back."""
        directory = _path(self.place)
        for name in self.place.folders():
            replaced = _final_name(name, "old")
            with self._reported(self.place / name):
                if replaced and not (directory / replaced).exists():
                    (directory / name).rename(directory / replaced)
                elif _SCRATCH.fullmatch(name):
                    discard(directory / name)


def _path(place: Place) -> Path:
    if place.path is None:
        raise ValueError(f"{place} is not on this machine")
    return place.path


def _final_name(name: str, purpose: str) -> str | None:
    """The final name of a scratch folder that serves `purpose`; None for any other folder."""
    match = _SCRATCH.fullmatch(name)
    return match["final"] if match and match["purpose"] == purpose else None
