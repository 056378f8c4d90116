"""The folders of a run's checkpoint directory: which are ours, which is newest, which may go.

A checkpoint of step N is a folder `step-N`; in an object store, where nothing can be renamed, a later attempt at the
same step is `step-N.again-<8 hex digits>`, and the later attempt counts. Beside them may stand what a killed run has
left, under names that say so (see `local_directory` and `remote_directory`), and strangers: everything whose name is
not exactly one of ours, which nothing here touches. Assumes one writer at a time. Looking never changes anything, so
other processes may look while one writes.
"""

import abc
import contextlib
import re
from collections.abc import Callable, Collection, Iterator

from titan_ckpt.errors import CheckpointError
from titan_ckpt.location import Location, place_of
from titan_ckpt.manifest import MANIFEST_NAME, Manifest
from titan_ckpt.place import Place

Report = Callable[[str], None]

_CHECKPOINT = re.compile(r"step-(?P<step>0|[1-9][0-9]*)(?:\.again-(?P<attempt>[0-9a-f]{8}))?")


def step_name(step: int, attempt: int = 0) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step}.again-{attempt:08x}" if attempt else f"step-{step}"


def attempt_of(name: str) -> tuple[int, int] | None:
    """The step and the attempt in the name of a checkpoint's folder; None for other names."""
    match = _CHECKPOINT.fullmatch(name)
    return (int(match["step"]), int(match["attempt"] or "0", 16)) if match else None


def step_of(name: str) -> int | None:
    """The step in the name of a checkpoint's folder, or of one that was being replaced; None for other names."""
    found = attempt_of(re.sub(r"\.old-[0-9a-f]{8}$", "", name))
    return found and found[0]


def is_checkpoint(folder: Location) -> bool:
    """Whether a folder was written as a checkpoint, by this package or as plain DCP, whole or not."""
    files = place_of(folder).files()
    return MANIFEST_NAME in files or ".metadata" in files


class Directory(abc.ABC):
    """Where the checkpoints of one run are, and how a folder in it becomes one: all at once.

    Args:
        place: the directory; need not exist.
        report: called with a sentence when tidying fails, which costs space and not a checkpoint.
    """

    def __init__(self, place: Place, report: Report) -> None:
        self.place = place
        self._report = report

    @abc.abstractmethod
    def candidates(self) -> list[Place]:
        """Folders that may hold a checkpoint, newest first."""

    @abc.abstractmethod
    def begin(self, step: int) -> Place:
        """Cleans up after a killed run and returns an empty folder to write a checkpoint into.

        Raises:
            CheckpointError: if something that is not a checkpoint has the name that it will get.
        """

    @abc.abstractmethod
    def publish(self, written: Place, step: int) -> Place:
        """Makes a folder with a manifest the checkpoint of its step, instead of earlier ones; returns where it is."""

    @abc.abstractmethod
    def abandon(self, written: Place) -> None:
        """Deletes a folder that is not to become a checkpoint."""

    @abc.abstractmethod
    def discard(self, folder: Place) -> None:
        """Deletes a checkpoint; killed at any point, what is left doesn't count as one."""

    @abc.abstractmethod
    def sweep(self) -> None:
        """Deletes what killed runs have left."""

    def retire(self, *, keep_latest: int, published: int, damaged: Collection[str]) -> None:
        """Deletes all but the `keep_latest` newest checkpoints up to the one just published; 0 keeps all.

        What is known to be damaged, or has files missing or of a wrong size, neither counts nor goes: it may be
        wanted for an autopsy, and counting it would cost a whole one. Neither do permanent ones; nor later steps,
        which are of a run that went further before this one started.
        """
        if keep_latest == 0:
            return
        passing = [
            folder
            for folder in self.candidates()
            if (step_of(folder.name) or 0) <= published and folder.name not in damaged and _is_whole_and_passing(folder)
        ]
        for folder in passing[keep_latest:]:
            with self._reported(folder):
                self.discard(folder)

    @contextlib.contextmanager
    def _reported(self, folder: Place) -> Iterator[None]:
        """Tidying that fails costs disk space, not a checkpoint: it is reported, and the run goes on."""
        try:
            yield
        except (OSError, CheckpointError) as error:
            self._report(f"{folder} could not be tidied up ({error}); delete it by hand.")


def _is_whole_and_passing(folder: Place) -> bool:
    try:
        manifest = Manifest.read(folder)
    except CheckpointError:
        return False
    return not manifest.permanent and not manifest.damage(folder, hashes=False)
