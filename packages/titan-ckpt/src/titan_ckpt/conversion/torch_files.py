"""Converts between a folder in PyTorch's Distributed Checkpoint (DCP) layout and a single `torch.save` file.

Both directions verify what they read as far as that can be done, read and write a piece of a tensor at a time, and
unpickle nothing but tensors and JSON values. Nobody has to know what the tensors belong to; for a model from one format
into another see `titan_ckpt.conversion.translate`.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from titan_ckpt.checkpoint import Checkpoint
from titan_ckpt.conversion.layouts import CheckpointLayout
from titan_ckpt.conversion.plan import Counter, Plan, Progress, check_parent, exists, no_progress, run
from titan_ckpt.conversion.translate import source_fingerprint, verified
from titan_ckpt.directory import is_checkpoint, step_of
from titan_ckpt.errors import CheckpointError, DamagedCheckpointError
from titan_ckpt.formats.dcp_folder import files_of_parts, read_dcp
from titan_ckpt.formats.streams import create
from titan_ckpt.formats.torch_file import is_torch_file, read_torch_file, write_torch_file
from titan_ckpt.location import Location, place_of
from titan_ckpt.manifest import Manifest
from titan_ckpt.place import Place
from titan_ckpt.state import check_names
from titan_ckpt.storage import SCRATCH_PATTERN, HashingFile, scratch


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion has done."""

    tensors: int
    """Number of tensors in the result."""

    size: int
    """Their bytes."""

    verified: bool
    """Whether the source had a manifest, and agreed with it."""

    left_out: tuple[str, ...]
    """Keys of what the source holds beside tensors, for which the result has no place."""


def dcp_to_torch(
    src: Location,
    dst: Location,
    *,
    only: str | None = None,
    overwrite: bool = False,
    verify_hashes: bool = True,
    progress: Progress = no_progress,
) -> Converted:
    """Writes the tensors of a DCP folder into one file, a flat `dict[str, Tensor]`.

    `torch.load(dst, weights_only=True, mmap=True)` reads it.

    Args:
        src: a checkpoint of this package, or any folder in DCP layout.
        dst: the file to write.
        only: take just what has a key that starts with this name and a dot, and take those off the keys.
        overwrite: replace `dst` if it is a file of `torch.save`.
        verify_hashes: compare the SHA-256 of every file with the manifest, if there is one; sizes in any case.
        progress: called with what is being done, the bytes done and the bytes in all.

    Raises:
        CheckpointError: if `src` is no such folder or is damaged, or `dst` cannot be written; `dst` is as before.
    """
    source, target = place_of(src), place_of(dst)
    _check_file(target, overwrite)
    _check_folder(source)
    manifest = verified(source, hashes=verify_hashes, progress=progress)
    collection = read_dcp(source)
    if collection.problems:
        raise DamagedCheckpointError(source, collection.problems)
    others = {*collection.others, *(_values(source, manifest) if manifest else ())}
    start = f"{only}." if only else ""
    tensors = {key.removeprefix(start): t for key, t in collection.tensors.items() if key.startswith(start)}
    if not tensors:
        names = ", ".join(sorted({key.partition(".")[0] for key in collection.tensors})) or "none"
        raise CheckpointError(f"{source} has no tensors under {only!r}. The names that it has: {names}.")
    size = sum(tensor.nbytes for tensor in tensors.values())
    with _new_file(target) as file, Counter(progress, "writing", size) as file.on_write:
        write_torch_file(file, tensors)
    return Converted(
        tensors=len(tensors),
        size=size,
        verified=manifest is not None,
        left_out=tuple(sorted(key for key in others if key.startswith(start))),
    )


def torch_to_dcp(
    src: Location,
    dst: Location,
    *,
    under: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress = no_progress,
) -> Converted:
    """Writes the content of a `torch.save` file as a checkpoint folder, which `Checkpointer.load` takes.

    Nested dicts are flattened, their keys joined by dots. JSON values among the leaves are kept in `state.json`;
    anything else is refused, listed by key. The checkpoint's step is that in the name of `dst` if it is `step-N`,
    else 0. Interrupted, it can be run again and goes on (see `titan_ckpt.conversion.plan`).

    Args:
        src: the file; loaded with `weights_only=True`.
        dst: the folder to write.
        under: a name to put before every key, with a dot: that of the object it will be loaded into.
        overwrite: replace `dst` if it is a checkpoint.
        restart: delete what an interrupted run has left.
        progress: called with what is being done, the bytes done and the bytes in all.

    Raises:
        CheckpointError: if `src` is no such file or is damaged, or `dst` cannot be written; `dst` is as before.
    """
    source, target = place_of(src), place_of(dst)
    _check_is_file(source)
    collection, values = read_torch_file(source.parent, source.name)
    try:
        check_names({under: collection} if under else {})
    except ValueError as error:
        raise CheckpointError(f"{source} cannot be converted. {error}.") from error
    if not collection.tensors:
        raise CheckpointError(f"{source} holds no tensors.")
    start = f"{under}." if under else ""
    tensors = {f"{start}{key}": tensor for key, tensor in collection.tensors.items()}
    layout = CheckpointLayout(
        tensors=tensors,
        parts=files_of_parts(tensors),
        under=under,
        step=step_of(target.name) or 0,
        values={f"{start}{key}": value for key, value in values.items()},
    )
    plan = Plan(
        source=source,
        destination=target,
        files=layout.data_files(),
        layout=layout,
        fingerprint={**source_fingerprint(collection), "under": under},
        tensors=len(tensors),
        nbytes=collection.nbytes,
    )
    run(plan, overwrite=overwrite, restart=restart, progress=progress)
    return Converted(tensors=len(tensors), size=collection.nbytes, verified=False, left_out=())


def _values(source: Place, manifest: Manifest) -> tuple[str, ...]:
    return tuple(Checkpoint(place=source, manifest=manifest).read_values())


def _check_folder(source: Place) -> None:
    if not source.exists():
        raise CheckpointError(f"{source} does not exist.")
    if source.path is not None and not source.path.is_dir():
        raise CheckpointError(f"{source} is a file, and a folder in DCP layout is wanted.")
    if not is_checkpoint(source):
        inside = [name for name in source.folders() if step_of(name) is not None]
        hint = f"It contains checkpoints; name one of them: {', '.join(inside)}." if inside else ""
        raise CheckpointError(f"{source} is no checkpoint: it has no .metadata file. {hint}".rstrip())


def _check_is_file(source: Place) -> None:
    if not source.exists():
        raise CheckpointError(f"{source} does not exist.")
    if source.path is not None and source.path.is_dir():
        raise CheckpointError(f"{source} is a folder, and a file that torch.save has written is wanted.")


def _check_file(target: Place, overwrite: bool) -> None:
    if target.path is not None and target.path.is_dir():
        raise CheckpointError(f"{target} is a folder. Give the name of a file, for instance {target / 'model.pt'}.")
    if target.exists():
        if not is_torch_file(target.parent, target.name):
            raise CheckpointError(f"{target} exists and is no file of torch.save. Give another name, or move it away.")
        if not overwrite:
            raise exists(target)
    check_parent(target)


@contextlib.contextmanager
def _new_file(target: Place) -> Iterator[HashingFile]:
    """A file that appears when the block ends: on a disk under a scratch name until then.

    Assumes that nobody else writes the same file now: scratch files of it are what killed runs have left.
    """
    path = target.path
    temporary = scratch(path, "tmp") if path is not None else None
    try:
        if path is not None:
            _remove_scratch(path)
        with create(target.parent, target.name if temporary is None else temporary.name) as file:
            yield file
        if path is not None and temporary is not None:
            temporary.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"{target} could not be written: {error}. Nothing of it remains; choose a place that exists, can be "
            "written to and has room."
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _remove_scratch(path: Path) -> None:
    for left in path.parent.iterdir():
        found = re.fullmatch(re.escape(path.name) + SCRATCH_PATTERN, left.name)
        if found and found["purpose"] == "tmp" and left.is_file():
            left.unlink(missing_ok=True)
