"""A checkpoint directory in an object store, where the manifest alone makes a checkpoint: it is written last.

Nothing can be renamed there, so files are written where they stay, and a step that is saved again gets a folder of
its own. What this package has begun and not finished, writing or deleting, is told from what others have put there by
a file `<folder>.unfinished` beside the folder, made before and removed after; only folders that have one are swept.
"""

from titan_ckpt.directory import Directory, attempt_of, step_name
from titan_ckpt.manifest import MANIFEST_NAME
from titan_ckpt.place import Place

_MARK = ".unfinished"


class RemoteDirectory(Directory):
    """Checkpoints appear with their manifest."""

    def candidates(self) -> list[Place]:
        """Folders with a manifest, newest first."""
        names = self.place.files()
        folders = {name.partition("/")[0] for name in names if name.count("/") == 1 and name.endswith(MANIFEST_NAME)}
        found = {folder: attempt_of(folder) for folder in folders if f"{folder}/{MANIFEST_NAME}" in names}
        known = sorted(((attempt, folder) for folder, attempt in found.items() if attempt), reverse=True)
        return [self.place / folder for _, folder in known]

    def begin(self, step: int) -> Place:
        """Marks a folder that is not there yet as unfinished."""
        self.sweep()
        taken = [attempt_of(name.partition("/")[0]) for name in self.place.files()]
        attempts = [attempt[1] for attempt in taken if attempt and attempt[0] == step]
        folder = self.place / step_name(step, max(attempts) + 1 if attempts else 0)
        self._mark(folder)
        return folder

    def publish(self, written: Place, step: int) -> Place:
        """Deletes earlier attempts at the step of a folder, which counts since it has its manifest."""
        self._unmark(written)
        own = attempt_of(written.name)
        for folder in self.candidates():
            attempt = attempt_of(folder.name)
            if own and attempt and attempt[0] == step and attempt < own:
                with self._reported(folder):
                    self.discard(folder)
        return written

    def abandon(self, written: Place) -> None:
        """Deletes a folder, and its mark after it."""
        self.discard(written)

    def discard(self, folder: Place) -> None:
        """Marks a folder, takes its manifest away, and deletes the rest then."""
        self._mark(folder)
        folder.remove(MANIFEST_NAME)
        folder.delete()
        self._unmark(folder)

    def sweep(self) -> None:
        """Deletes folders that were begun and have no manifest, and marks of those that have one."""
        names = self.place.files()
        marked = [name.removesuffix(_MARK) for name in names if name.endswith(_MARK) and "/" not in name]
        for folder in (self.place / name for name in marked if attempt_of(name)):
            with self._reported(folder):
                if f"{folder.name}/{MANIFEST_NAME}" not in names:
                    folder.delete()
                self._unmark(folder)

    def _mark(self, folder: Place) -> None:
        self.place.write(f"{folder.name}{_MARK}", b"A checkpoint is being written or deleted here.\n")

    def _unmark(self, folder: Place) -> None:
        self.place.remove(f"{folder.name}{_MARK}")
