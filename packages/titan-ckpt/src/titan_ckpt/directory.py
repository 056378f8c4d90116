"""The folders of a run's checkpoint directory: which are ours, which is newest, which may go.

A checkpoint of step N is a folder `step-N`. Beside it may stand scratch folders (see `storage`) that a killed
run has left, and strangers: everything whose name is not exactly one of ours, which nothing here touches.
Assumes one writer at a time. Looking never changes anything, so a second process may look while one writes.
"""

import contextlib
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from titan_ckpt.errors import CheckpointError
from titan_ckpt.manifest import MANIFEST_NAME, Manifest
from titan_ckpt.storage import SCRATCH_PATTERN, discard, scratch

_STEP = re.compile(r"step-(\d+)")
_SCRATCH = re.compile(rf"(?P<final>step-\d+)(?:{SCRATCH_PATTERN})+")


def step_folder(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return directory / f"step-{step}"


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint's folder, be it its own or the `.old-` one; None for other names."""
    match = _STEP.fullmatch(_final_name(folder, "old") or folder.name)
    return int(match[1]) if match else None


def candidates(directory: Path) -> list[Path]:
    """Folders that may hold a checkpoint, newest first.

    A folder that was being replaced when the run was killed counts, under its `.old-` name, as long as its
    replacement is not there.
    """
    found = []
    for path in _folders(directory):
        replaced = _final_name(path, "old")
        step = step_of(path)
        if step is not None and not (replaced and (directory / replaced).exists()):
            found.append((step, path))
    return [path for _, path in sorted(found, reverse=True)]


def begin(final: Path, report: Callable[[str], None]) -> Path:
    """Cleans up after a killed run and makes the scratch folder in which a checkpoint is written.

    Raises:
        CheckpointError: if something that is not a checkpoint has the name that it will get.
    """
    directory = final.parent
    directory.mkdir(parents=True, exist_ok=True)
    sweep(directory, report)
    if final.exists() and not is_checkpoint(final):
        raise CheckpointError(f"{final} is in the way: it is not a checkpoint. Move it elsewhere")
    temporary = scratch(final, "tmp")
    temporary.mkdir()
    return temporary


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder was written as a checkpoint, by this package or as plain DCP, whole or not."""
    return (folder / MANIFEST_NAME).is_file() or (folder / ".metadata").is_file()


def sweep(directory: Path, report: Callable[[str], None]) -> None:
    """Deletes what killed runs have left, and gives a folder that was being replaced its name back."""
    for path in _folders(directory):
        replaced = _final_name(path, "old")
        with _reported(path, report):
            if replaced and not (directory / replaced).exists():
                path.rename(directory / replaced)
            elif _SCRATCH.fullmatch(path.name):
                discard(path)


def retire(
    directory: Path,
    *,
    keep_latest: int,
    published: int,
    damaged: Collection[str],
    report: Callable[[str], None],
) -> None:
    """Deletes all but the `keep_latest` newest checkpoints up to the one just published; 0 keeps all.

    What is known to be damaged, or has files missing or of a wrong size, neither counts nor goes: it may be
    wanted for an autopsy, and counting it would cost a whole one. Neither do later steps, which are of a run
    that went further before this one started.
    """
    if keep_latest == 0:
        return
    whole = [
        folder
        for folder in candidates(directory)
        if (step_of(folder) or 0) <= published and folder.name not in damaged and _looks_whole(folder)
    ]
    for folder in whole[keep_latest:]:
        with _reported(folder, report):
            discard(folder)


def _folders(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []


def _final_name(folder: Path, purpose: str) -> str | None:
    """The final name of a scratch folder that serves `purpose`; None for any other folder."""
    match = _SCRATCH.fullmatch(folder.name)
    return match["final"] if match and match["purpose"] == purpose else None


def _looks_whole(folder: Path) -> bool:
    try:
        return not Manifest.read(folder).damage(folder, hashes=False)
    except CheckpointError:
        return False


@contextlib.contextmanager
def _reported(folder: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Tidying that fails costs disk space, not a checkpoint: it is reported, and the run goes on."""
    try:
        yield
    except OSError as error:
        report(f"{folder} could not be tidied up ({error}); delete it by hand.")
