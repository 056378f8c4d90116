"""Tensors to and from folders in PyTorch's Distributed Checkpoint (DCP) layout.

The layout is the standard one (`.metadata` and one `__<rank>_<n>.distcp` a rank), so that anybody's
`torch.distributed.checkpoint.load` reads what is written here, and the other way round. Different from torch's
own writer, every file is hashed while it is written and synced; different from its reader, `.metadata` (a
pickle) may name only the classes it is made of.

Importing this module imports torch.distributed.checkpoint, which costs 0.8 s: import it where it is used.
"""

import contextlib
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from titan_ckpt.errors import CheckpointError, DamagedCheckpointError
from titan_ckpt.manifest import FileRecord
from titan_ckpt.storage import HashingFile

METADATA_NAME = ".metadata"

# What torch 2.13 puts into `.metadata`; dtypes come on top.
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_METADATA_MODULE, name) for name in torch_dcp.metadata.__all__),
    (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


def write(
    folder: Path, tensors: dict[str, Any], rank: int, on_write: Callable[[int], object] = lambda size: None
) -> dict[str, FileRecord]:
    """Writes a nested dict of tensors; every rank of the world calls it, each gives what it has.

    A DTensor is written shard by shard; a plain tensor is taken to be the same wherever its key occurs and is
    written once. `on_write` is called with the number of bytes each time some have been written.

    Returns:
        The records of the files that this rank has written, by name; nothing if only others have failed (who
        raise).
    """
    writer = _Writer(folder, on_write)
    with _quiet(), _own_failure(rank), _no_checksums():
        torch_dcp.save(tensors, storage_writer=writer)
    return writer.files.records


def read(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    metadata: Metadata,
    rank: int,
    progress: Callable[[int], object] = lambda size: None,
) -> None:
    """Fills tensors in place with what is saved under their keys; every rank calls it for what it needs.

    Args:
        folder: where the data files are.
        tensors: what to fill, in any layout; reads only what a rank has of a DTensor.
        metadata: what `read_metadata(folder)` returned.
        rank: of the caller.
        progress: called with the number of bytes each time some have been read.
    """
    with _quiet(), _own_failure(rank):
        torch_dcp.load(tensors, storage_reader=_Reader(folder, metadata), planner=_Planner(progress))


def read_metadata(folder: Path) -> Metadata:
    """What a DCP folder holds: names, shapes, dtypes, and where the bytes of each piece are.

    Raises:
        DamagedCheckpointError: if it cannot be read.
        CheckpointError: if it is a pickle that asks for anything but what DCP's metadata consists of.
    """
    try:
        with (folder / METADATA_NAME).open("rb") as file:
            return _MetadataUnpickler(file).load()
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise DamagedCheckpointError(folder, [f"{METADATA_NAME} is missing"]) from None
    except Exception as error:  # what a truncated pickle raises is anybody's guess
        raise DamagedCheckpointError(folder, [f"{METADATA_NAME} cannot be read ({error})"]) from error


def tensor_entries(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """The tensors in a folder by key; everything else that it may hold is pickled and not read by us."""
    entries = metadata.state_dict_metadata
    return {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def missing_bytes(folder: Path, metadata: Metadata) -> list[str]:
    """Which data files of a folder are absent or too short for what its metadata says, one sentence each."""
    needed: dict[str, int] = {}
    for piece in metadata.storage_data.values():
        end = piece.offset + piece.length
        needed[piece.relative_path] = max(end, needed.get(piece.relative_path, 0))
    problems = []
    for name, size in sorted(needed.items()):
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif (folder / name).stat().st_size < size:
            problems.append(f"{name} has {(folder / name).stat().st_size:,} bytes of at least {size:,}")
    return problems


class _HashingFileSystem(FileSystem):
    """DCP's way to files, with the record of each file it has written."""

    def __init__(self, on_write: Callable[[int], object]) -> None:
        super().__init__()
        self.records: dict[str, FileRecord] = {}
        self._on_write = on_write

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[HashingFile]:
        with HashingFile(Path(path), self._on_write) as file:
            yield file
        self.records[Path(path).name] = file.record

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class _Writer(torch_dcp.FileSystemWriter):
    """DCP's writer onto files that are hashed; the same state gives the same bytes, wherever it is written."""

    def __init__(self, folder: Path, on_write: Callable[[int], object]) -> None:
        super().__init__(folder, sync_files=False)  # our files sync themselves
        self.files = _HashingFileSystem(on_write)
        self.fs: FileSystem = self.files

    def storage_meta(self) -> None:
        """Nothing: torch's has the path that is being written to and a random id, and no reader needs it."""


class _Reader(torch_dcp.FileSystemReader):
    """DCP's reader, with metadata that was read safely."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _Planner(torch_dcp.DefaultLoadPlanner):
    """DCP's planner for flat state dicts, telling how far it is."""

    def __init__(self, progress: Callable[[int], object]) -> None:
        super().__init__(flatten_state_dict=False)
        self._progress = progress

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self._progress(tensor.nbytes)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise CheckpointError(
            f"{METADATA_NAME} asks for {module}.{name}, which is no part of a checkpoint's metadata and might run "
            "code. If you trust its origin, load it with torch.distributed.checkpoint and save the tensors anew"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns when there is no process group; to save from one process is nothing unusual here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextlib.contextmanager
def _no_checksums() -> Iterator[None]:
    """Saves torch the CRC-32 of each tensor, which no reader looks at; the file's SHA-256 says more."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


@contextlib.contextmanager
def _own_failure(rank: int) -> Iterator[None]:
    """Turns DCP's exception, which holds all ranks' and is no `Exception`, into this rank's own, if it has one."""
    try:
        yield
    except CheckpointException as failed:
        if rank in failed.failures:
            raise failed.failures[rank][0] from None
