"""Converts between a folder in PyTorch's Distributed Checkpoint (DCP) layout and a single `torch.save` file.

Both directions verify what they read as far as that can be done, write under a scratch name, and rename when all
of it is on the disk. Nothing is unpickled but tensors and JSON values. `torch_to_dcp` maps its source into memory
and needs little more than its largest tensor; `dcp_to_torch` holds all the tensors it converts at once.
"""

import contextlib
import pickle
import re
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

import torch

from titan_ckpt import dcp
from titan_ckpt.checkpoint import Checkpoint
from titan_ckpt.contents import Contents, write_contents
from titan_ckpt.directory import candidates, is_checkpoint, step_of
from titan_ckpt.errors import CheckpointError, DamagedCheckpointError
from titan_ckpt.manifest import MANIFEST_NAME, Manifest
from titan_ckpt.state import check_names, flatten, tensors_only
from titan_ckpt.storage import HashingFile, discard, publish, scratch, sync_folder
from titan_ckpt.world import RanksFailedError, World

Progress: TypeAlias = Callable[[str, int, int], object]  # called from any thread


def _no_progress(what: str, done: int, total: int) -> None:
    """The default `Progress`: what is being done, the bytes done, the bytes in all."""


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
    src: Path,
    dst: Path,
    *,
    only: str | None = None,
    overwrite: bool = False,
    verify_hashes: bool = True,
    progress: Progress = _no_progress,
) -> Converted:
    """Writes the tensors of a DCP folder into one file, a flat `dict[str, Tensor]`.

    `torch.load(dst, weights_only=True, mmap=True)` reads it.

    Args:
        src: a checkpoint of this package, or any folder in DCP layout.
        dst: the file to write.
        only: take just what has a key that starts with this name and a dot, and take those off the keys.
        overwrite: replace `dst` if it exists.
        verify_hashes: compare the SHA-256 of every file with the manifest, if there is one; sizes in any case.
        progress: called with what is being done, the bytes done and the bytes in all.

    Raises:
        CheckpointError: if `src` is no such folder or is damaged, or `dst` cannot be written; `dst` is as before.
    """
    if dst.is_dir():
        raise CheckpointError(f"{dst} is a folder. Give the name of a file, for instance {dst / 'model.pt'}.")
    if dst.exists() and not overwrite:
        raise CheckpointError(f"{dst} exists. Give another name, or ask for it to be overwritten.")
    _check_is_folder(src)
    with _new_file(dst) as file:
        manifest = _verified(src, verify_hashes, progress)
        metadata = dcp.read_metadata(src)
        if problems := dcp.missing_bytes(src, metadata):
            raise DamagedCheckpointError(src, problems)
        entries = dcp.tensor_entries(metadata)
        others = metadata.state_dict_metadata.keys() - entries.keys()
        if manifest is not None:
            others |= Checkpoint(path=src, manifest=manifest).read_values().keys()
        start = f"{only}." if only else ""
        tensors = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in entries.items()
            if key.startswith(start)
        }
        if not tensors:
            names = ", ".join(sorted({key.partition(".")[0] for key in entries})) or "none"
            raise CheckpointError(f"{src} has no tensors under {only!r}. The names that it has: {names}.")
        size = sum(tensor.nbytes for tensor in tensors.values())
        try:
            with _Counter(progress, "reading", size) as counter:
                dcp.read(src, tensors, metadata, rank=0, progress=counter)
        except Exception as error:  # what a damaged archive makes torch raise is anybody's guess
            raise DamagedCheckpointError(src, [f"a tensor cannot be read ({_first_line(error)})"]) from error
        with _Counter(progress, "writing", size) as file.on_write:
            torch.save({key.removeprefix(start): tensor for key, tensor in tensors.items()}, cast(IO[bytes], file))
    return Converted(
        tensors=len(tensors),
        size=size,
        verified=manifest is not None,
        left_out=tuple(sorted(key for key in others if key.startswith(start))),
    )


def torch_to_dcp(
    src: Path,
    dst: Path,
    *,
    under: str | None = None,
    overwrite: bool = False,
    progress: Progress = _no_progress,
) -> Converted:
    """Writes the content of a `torch.save` file as a checkpoint folder, which `Checkpointer.load` takes.

    Nested dicts are flattened, their keys joined by dots. JSON values among the leaves are kept in `state.json`;
    anything else is refused, listed by key. The checkpoint's step is that in the name of `dst` if it is `step-N`,
    else 0.

    Args:
        src: the file; loaded with `weights_only=True`.
        dst: the folder to write.
        under: a name to put before every key, with a dot: that of the object it will be loaded into.
        overwrite: replace `dst` if it is a checkpoint.
        progress: called with what is being done, the bytes done and the bytes in all.

    Raises:
        CheckpointError: if `src` is no such file or is damaged, or `dst` cannot be written; `dst` is as before.
    """
    if dst.exists() and not is_checkpoint(dst):
        raise CheckpointError(f"{dst} exists and is not a checkpoint. Give another name.")
    if dst.exists() and not overwrite:
        raise CheckpointError(f"{dst} exists. Give another name, or ask for it to be overwritten.")
    with _new_folder(dst) as folder:
        tree = _load(src)
        try:
            check_names({under: tree} if under else {})
            tree = {under: tree} if under else tree
            flat = flatten(tree)
        except ValueError as error:
            raise CheckpointError(f"{src} cannot be converted. {error}.") from error
        if not flat.tensors:
            raise CheckpointError(f"{src} holds no tensors.")
        size = sum(tensor.nbytes for tensor in flat.tensors.values())
        contents = Contents(
            tensors=tensors_only(tree),
            values=flat.values,
            state=sorted({key.partition(".")[0] for key in [*flat.tensors, *flat.values]}),
            per_rank=(),
        )
        with _Counter(progress, "writing", size) as counter:
            write_contents(World(), folder, contents, step=step_of(dst) or 0, meta={}, files={}, on_write=counter)
    return Converted(tensors=len(flat.tensors), size=size, verified=False, left_out=())


def _check_is_folder(src: Path) -> None:
    if not src.exists():
        raise CheckpointError(f"{src} does not exist.")
    if not src.is_dir():
        raise CheckpointError(f"{src} is a file, and a folder in DCP layout is wanted.")
    if not is_checkpoint(src):
        inside = [path.name for path in candidates(src)]
        hint = f"It contains checkpoints; name one of them: {', '.join(inside)}." if inside else ""
        raise CheckpointError(f"{src} is no checkpoint: it has no {dcp.METADATA_NAME} file. {hint}".rstrip())


def _verified(src: Path, verify_hashes: bool, progress: Progress) -> Manifest | None:
    """The manifest of a checkpoint of ours, with which its files agree; None for a plain DCP folder."""
    if not (src / MANIFEST_NAME).exists():
        return None
    manifest = Manifest.read(src)
    with _Counter(progress, "verifying", sum(record.size for record in manifest.files.values())) as counter:
        problems = manifest.damage(src, hashes=verify_hashes, progress=counter)
    if problems:
        raise DamagedCheckpointError(src, problems)
    return manifest


def _load(src: Path) -> Mapping[str, Any]:
    """The dict in a `torch.save` file, its tensors mapped into memory where the format allows."""
    if not src.exists():
        raise CheckpointError(f"{src} does not exist.")
    if src.is_dir():
        raise CheckpointError(f"{src} is a folder, and a file that torch.save has written is wanted.")
    try:
        tree = torch.load(src, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(src))
    except Exception as error:  # what a damaged file makes torch raise is anybody's guess
        if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL (\S+)", str(error))):
            raise CheckpointError(
                f"{src} holds more than tensors: loading it would run {found[1]}. Save the state_dict() alone, in "
                "the program it comes from, and convert that."
            ) from error
        raise CheckpointError(
            f"{src} cannot be read as a torch.save file; it is damaged or of another kind ({_first_line(error)})."
        ) from error
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{src} holds a {type(tree).__name__}, and a dict of tensors is wanted.")
    return tree


@contextlib.contextmanager
def _new_file(dst: Path) -> Iterator[HashingFile]:
    """A file under a scratch name, which becomes `dst` when the block ends and is removed if it fails."""
    temporary = scratch(dst, "tmp")
    try:
        with HashingFile(temporary) as file:
            yield file
        temporary.replace(dst)
        sync_folder(dst.parent)
    except OSError as error:
        raise _unwritable(dst, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _new_folder(dst: Path) -> Iterator[Path]:
    """A folder under a scratch name, which becomes `dst` when the block ends and is removed if it fails."""
    temporary = scratch(dst, "tmp")
    try:
        temporary.mkdir()
        yield temporary
        replaced = publish(temporary, dst)
        if replaced is not None:
            discard(replaced)
    except (OSError, RanksFailedError) as error:
        raise _unwritable(dst, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unwritable(dst: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{dst} could not be written: {error}. Nothing of it remains; choose a place that exists, can be written to "
        "and has room."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _Counter:
    """Adds up bytes, from any thread, and tells how far one part of a conversion is.

    A file has more bytes than its tensors, so that the end of the block and not the sum says when it is done.
    """

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self._progress, self._what, self._total = progress, what, total
        self._done = 0
        self._lock = threading.Lock()

    def __call__(self, size: int) -> None:
        with self._lock:
            self._done += size
            if self._done < self._total:
                self._progress(self._what, self._done, self._total)

    def __enter__(self) -> "_Counter":
        return self

    def __exit__(self, exc_type: object, exc_val: object, exc_tb: object) -> None:
        if exc_val is None:
            self._progress(self._what, self._total, self._total)
