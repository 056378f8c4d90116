"""Tensors to and from folders in PyTorch's Distributed Checkpoint (DCP) layout.

The layout is the standard one (`.metadata`, a pickle, and files `__<rank>_<n>.distcp` of what `torch.save` makes of
each piece), so that anybody's `torch.distributed.checkpoint.load` reads what is written here, and the other way round.
Who writes or reads which piece is planned by torch's planners. Different from torch's own writer and reader: a rank
writes two files at a time, each hashed on the way; an error of a thread is never lost; what is written may be a copy
of the tensors that were planned; `.metadata` may name only the classes it is made of; and folders may be remote.

Importing this module imports torch.distributed.checkpoint, which costs 0.8 s: import it where it is used.
"""

import contextlib
import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem

from titan_ckpt.compat import StorageInfo
from titan_ckpt.errors import CheckpointError, DamagedCheckpointError
from titan_ckpt.location import Location, place_of
from titan_ckpt.place import Place
from titan_ckpt.storage import FileRecord
from titan_ckpt.world import World

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

_FILES_A_RANK = 2  # written at once: a hash takes longer than a fast disk, and the two take turns where it doesn't
_SECOND_FILE_ABOVE = 1 << 26  # bytes; below, a second file gains nothing
_READERS = 4  # pieces that a rank reads at once, each in memory twice


@dataclass(frozen=True)
class Share:
    """What one rank could write of a state: its shards, and whatever others have too."""

    plan: SavePlan
    """What there is; which rank writes what all of them have is decided by `write`."""

    data: Mapping[MetadataIndex, torch.Tensor]
    """The tensor of each piece of the plan, plain, on any device."""

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(tensor.nbytes for tensor in self.data.values())


def share_of(tensors: dict[str, Any], *, is_first: bool = True) -> Share:
    """What this rank has of a nested dict of tensors; no communication, and nothing is copied.

    A DTensor is written shard by shard; a plain tensor is taken to be the same wherever its key occurs and is
    written once. `is_first` is whether this is rank 0.
    """
    planner = torch_dcp.DefaultSavePlanner()
    planner.set_up_planner(tensors, is_coordinator=is_first)
    plan = planner.create_local_plan()
    return Share(plan, {item.index: cast(torch.Tensor, planner.resolve_data(item)).detach() for item in plan.items})


def write(
    folder: Location, share: Share, world: World, on_write: Callable[[int], object] = lambda size: None
) -> dict[str, FileRecord]:
    """Writes what the ranks have into an empty folder; all of them call it.

    `on_write` is called with the number of bytes each time some have been written, from several threads.

    Returns:
        The records of all files by name, on rank 0; nothing on the others.

    Raises:
        RanksFailedError: on every rank, if any could not write.
    """
    place = place_of(folder)
    plans = world.gather_first(share.plan)
    described: list[Metadata] = []

    def divide() -> Sequence[SavePlan]:
        divided, metadata = torch_dcp.DefaultSavePlanner().create_global_plan(plans)
        described.append(metadata)
        return [replace(plan, planner_data=None) for plan in divided]

    plan = world.deal(divide)
    own = world.together(lambda: _write_files(place, plan.items, share.data, world.rank, on_write))
    written = world.gather_first(own)

    def finish() -> dict[str, FileRecord]:
        (metadata,) = described
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {index: info for part in written for index, info in part.pieces.items()}
        records = {name: record for part in written for name, record in part.records.items()}
        return records | {METADATA_NAME: place.write(METADATA_NAME, pickle.dumps(metadata))}

    records: dict[str, FileRecord] = {}
    world.first(lambda: records.update(finish()))
    return records


def read(
    folder: Location,
    tensors: dict[str, torch.Tensor],
    metadata: Metadata,
    progress: Callable[[int], object] = lambda size: None,
) -> None:
    """Fills tensors in place with what is saved under their keys; no communication.

    Args:
        folder: where the data files are.
        tensors: what to fill, in any layout; reads only the pieces that hold some of what a rank has of a DTensor.
        metadata: what `read_metadata(folder)` returned.
        progress: called with the number of bytes each time some have been read, from several threads.
    """
    place = place_of(folder)
    planner = torch_dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(tensors, metadata)
    pieces = metadata.storage_data

    def fill(item: ReadItem) -> None:
        piece = pieces[item.storage_index]
        content = io.BytesIO(place.read(piece.relative_path, piece.offset, piece.length))
        saved = torch.load(content, map_location="cpu", weights_only=True)
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            saved = saved.narrow(dim, start, length)
        target = planner.resolve_tensor(item).detach()
        if target.shape != saved.shape:
            raise CheckpointError(f"{item.storage_index.fqn} has a piece of {list(saved.shape)}, not as planned")
        target.copy_(saved)
        progress(saved.nbytes)

    # In the order of the files, which is how disks like to be read.
    items = sorted(planner.create_local_plan().items, key=lambda item: _position(pieces[item.storage_index]))
    with ThreadPoolExecutor(_READERS) as threads:
        for _ in threads.map(fill, items):
            pass


def read_metadata(folder: Location) -> Metadata:
    """What a DCP folder holds: names, shapes, dtypes, and where the bytes of each piece are.

    Raises:
        DamagedCheckpointError: if it cannot be read.
        CheckpointError: if it is a pickle that asks for anything but what DCP's metadata consists of.
    """
    try:
        return _MetadataUnpickler(io.BytesIO(place_of(folder).read(METADATA_NAME))).load()
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


def missing_bytes(folder: Location, metadata: Metadata) -> list[str]:
    """Which data files of a folder are absent or too short for what its metadata says, one sentence each."""
    needed: dict[str, int] = {}
    for piece in metadata.storage_data.values():
        end = piece.offset + piece.length
        needed[piece.relative_path] = max(end, needed.get(piece.relative_path, 0))
    sizes = place_of(folder).files()
    problems = []
    for name, size in sorted(needed.items()):
        if name not in sizes:
            problems.append(f"{name} is missing")
        elif sizes[name] < size:
            problems.append(f"{name} has {sizes[name]:,} bytes of at least {size:,}")
    return problems


@dataclass(frozen=True)
class _Written:
    """What one rank has written."""

    pieces: Mapping[MetadataIndex, StorageInfo]
    records: Mapping[str, FileRecord]


def _write_files(
    place: Place,
    items: Sequence[WriteItem],
    data: Mapping[MetadataIndex, torch.Tensor],
    rank: int,
    on_write: Callable[[int], object],
) -> _Written:
    def write_file(number: int, share: Sequence[MetadataIndex]) -> _Written:
        name, pieces = f"__{rank}_{number}.distcp", {}
        with _no_checksums(), place.create(name, on_write) as file:
            for index in share:
                start = file.tell()
                torch.save(_alone(data[index]), cast(IO[bytes], file))
                pieces[index] = StorageInfo(name, start, file.tell() - start)
        return _Written(pieces, {name: file.record})

    shares = _shares({item.index: data[item.index].nbytes for item in items})
    with ThreadPoolExecutor(_FILES_A_RANK) as threads:
        parts = list(threads.map(write_file, range(len(shares)), shares))
    return _Written(
        {index: info for part in parts for index, info in part.pieces.items()},
        {name: record for part in parts for name, record in part.records.items()},
    )


def _shares(sizes: Mapping[MetadataIndex, int]) -> list[list[MetadataIndex]]:
    """What goes into which file, so that the files become equally large; nothing if there is nothing."""
    count = _FILES_A_RANK if sum(sizes.values()) > _SECOND_FILE_ABOVE else min(len(sizes), 1)
    shares: list[list[MetadataIndex]] = [[] for _ in range(count)]
    filled = [0] * count
    for index in sorted(sizes, key=lambda index: -sizes[index]):
        smallest = filled.index(min(filled))
        shares[smallest].append(index)
        filled[smallest] += sizes[index]
    return [share for share in shares if share]


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory, with no more behind it than it shows: `torch.save` saves whole storages."""
    tensor = tensor.cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _position(piece: StorageInfo) -> tuple[str, int]:
    return piece.relative_path, piece.offset


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise CheckpointError(
            f"{METADATA_NAME} asks for {module}.{name}, which is no part of a checkpoint's metadata and might run "
            "code. If you trust its origin, load it with torch.distributed.checkpoint and save the tensors anew"
        )


@contextlib.contextmanager
def _no_checksums() -> Iterator[None]:
    """Saves torch, in this thread, the CRC-32 of each tensor, which no reader looks at; the SHA-256 says more."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
