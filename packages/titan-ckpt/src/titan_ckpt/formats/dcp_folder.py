"""Folders in PyTorch's Distributed Checkpoint (DCP) layout, read and written a few rows at a time.

`.metadata` says which file holds each chunk of each tensor, and where; there, the chunk is an archive of its own, as
`torch.save` writes it. torch's reader loads a chunk as a whole; here only its description is read, and of its numbers
the rows that are wanted. Written are chunks of some 32 MiB, in files of about a GiB.
"""

import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from titan_ckpt import compat, dcp
from titan_ckpt.errors import DamagedCheckpointError
from titan_ckpt.formats.collection import Collection, Tensors
from titan_ckpt.formats.lazy import LazyTensor
from titan_ckpt.formats.stored import StoredFile
from titan_ckpt.formats.streams import without_checksums
from titan_ckpt.formats.torch_file import first_line, placed
from titan_ckpt.place import Place
from titan_ckpt.storage import HashingFile

FILE_BYTES = 1 << 30  # one file is written at a time and kept whole when a conversion is interrupted
_ALIGNMENT = 64


def read_dcp(place: Place) -> Collection:
    """The tensors of a folder; files that are missing or too short are in `problems`.

    Raises:
        DamagedCheckpointError: if `.metadata` cannot be read.
        CheckpointError: if it asks for anything but what DCP's metadata consists of.
    """
    metadata = dcp.read_metadata(place)
    sizes = place.files()
    problems = dcp.missing_bytes(place, metadata)
    files: dict[str, StoredFile] = {}
    tensors = {}
    for key, entry in sorted(dcp.tensor_entries(metadata).items()):
        chunks = []
        for chunk in entry.chunks:
            stored = metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
            if stored is None:
                problems.append(f"{dcp.METADATA_NAME} does not say where a chunk of {key} is")
            elif stored.relative_path in sizes and not problems:
                file = files.setdefault(stored.relative_path, StoredFile(place, stored.relative_path))
                chunks.append(_Chunk(place, key, file, stored, chunk, entry.properties.dtype))
        if sum(chunk.count for chunk in chunks) != entry.size.numel() and not problems:
            problems.append(f"{dcp.METADATA_NAME} has chunks of {key} that do not add up to {list(entry.size)}")
        tensors[key] = _assembled(chunks, entry)
    names = {stored.relative_path for stored in metadata.storage_data.values()}
    return Collection(
        place=place,
        format="DCP",
        tensors=tensors,
        others=tuple(sorted(metadata.state_dict_metadata.keys() - tensors.keys())),
        files={name: size for name, size in sizes.items() if name in names},
        problems=tuple(dict.fromkeys(problems)),
    )


class _Chunk:
    """One box of a tensor, of which rows are read when they are asked for."""

    def __init__(
        self, place: Place, key: str, file: StoredFile, stored: Any, chunk: ChunkStorageMetadata, dtype: torch.dtype
    ) -> None:
        self.offsets, self.sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        self.count, self.file = chunk.sizes.numel(), file.name
        self._place, self._key, self._source, self._stored, self._dtype = place, key, file, stored, dtype
        self._found: LazyTensor | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the chunk, counted in the chunk."""
        if self._found is None:
            self._found = self._described()
        return self._found.read(start, stop)

    def _described(self) -> LazyTensor:
        stored = self._stored
        try:
            archive = self._source.open(stored.offset, stored.length)
            with compat.fake_tensors():
                tensor = torch.load(io.BufferedReader(archive), map_location="cpu", weights_only=True)
                found = placed(self._source, tensor, stored.offset)
        except Exception as error:  # what a damaged archive makes torch raise is anybody's guess
            problem = f"{self.file}: a tensor cannot be read, {self._key} ({first_line(error)})"
            raise DamagedCheckpointError(self._place, [problem]) from error
        if (found.dtype, found.shape) != (self._dtype, self.sizes):
            problem = f"{self.file}: {self._key} is {found.dtype} {list(found.shape)} there"
            raise DamagedCheckpointError(self._place, [f"{problem}, and {dcp.METADATA_NAME} says otherwise"])
        return found


def _assembled(chunks: Sequence[_Chunk], entry: TensorStorageMetadata) -> LazyTensor:
    """A tensor from its chunks, which may cut any dimension."""
    shape, dtype = tuple(entry.size), entry.properties.dtype

    def read(start: int, stop: int) -> Tensor:
        if not shape:
            return chunks[0].rows(0, 1)
        overlapping = [c for c in chunks if c.offsets[0] < stop and c.offsets[0] + c.sizes[0] > start and c.count]
        if len(overlapping) == 1 and overlapping[0].sizes[1:] == shape[1:]:
            return overlapping[0].rows(start - overlapping[0].offsets[0], stop - overlapping[0].offsets[0])
        rows = torch.empty((stop - start, *shape[1:]), dtype=dtype)
        for chunk in overlapping:
            first, last = max(start, chunk.offsets[0]), min(stop, chunk.offsets[0] + chunk.sizes[0])
            box = (slice(first - start, last - start), *map(_slice, chunk.offsets[1:], chunk.sizes[1:]))
            rows[box] = chunk.rows(first - chunk.offsets[0], last - chunk.offsets[0])
        return rows

    return LazyTensor(dtype, shape, tuple(dict.fromkeys(chunk.file for chunk in chunks)), read)


def _slice(offset: int, size: int) -> slice:
    return slice(offset, offset + size)


@dataclass(frozen=True)
class Part:
    """Some rows of a tensor, which become a chunk."""

    key: str
    start: int
    stop: int


def files_of_parts(tensors: Tensors) -> dict[str, list[Part]]:
    """Cuts tensors into chunks and distributes them over files, in their order."""
    groups: list[list[Part]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        for start, stop in tensor.pieces() if tensor.rows else [(0, 0)]:
            part_bytes = tensor.nbytes_of(stop - start)
            if groups[-1] and size + part_bytes > FILE_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(Part(key, start, stop))
            size += part_bytes
    return {f"__0_{i}.distcp": group for i, group in enumerate(groups)}


def write_parts(file: HashingFile, tensors: Tensors, parts: Sequence[Part]) -> list[list[int]]:
    """Writes one file; returns offset and length of each part in it."""
    places = []
    with without_checksums():
        for part in parts:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            offset = file.tell()
            torch.save(_own_storage(tensors[part.key].read(part.start, part.stop)), cast(IO[bytes], file))
            places.append([offset, file.tell() - offset])
    return places


def _own_storage(tensor: Tensor) -> Tensor:
    """The tensor alone: `torch.save` would write all of the memory that it shares."""
    dense = tensor.contiguous()
    alone = dense.untyped_storage().nbytes() == dense.nbytes
    return dense if alone else dense.clone()


def metadata_bytes(
    tensors: Tensors,
    shared: Mapping[str, str],
    files: Mapping[str, Sequence[Part]],
    places: Mapping[str, Sequence[Sequence[int]]],
    under: str | None,
) -> bytes:
    """The content of `.metadata`.

    Args:
        tensors: what was written, by key.
        shared: further keys of the same tensors, which lead to the same bytes.
        files: what went into each file.
        places: what `write_parts` returned for each file.
        under: the object that all keys begin with, so that torch gives nested dicts; None: keys are taken whole.
    """
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, Any] = {}
    names: dict[str, list[str]] = {key: [key] for key in tensors}
    for name, key in shared.items():
        names[key].append(name)
    for key, part, stored in _located(files, places):
        tensor = tensors[key]
        offsets = torch.Size((part.start, *(0 for _ in tensor.shape[1:]))) if tensor.shape else torch.Size()
        sizes = torch.Size((part.stop - part.start, *tensor.shape[1:])) if tensor.shape else torch.Size()
        for name in names[key]:
            properties = TensorProperties(dtype=tensor.dtype)
            entry = entries.setdefault(name, TensorStorageMetadata(properties, torch.Size(tensor.shape), []))
            storage[MetadataIndex(name, offsets, len(entry.chunks))] = stored
            entry.chunks.append(ChunkStorageMetadata(offsets, sizes))
    paths = {name: (name,) if under is None else (under, name.removeprefix(f"{under}.")) for name in entries}
    return pickle.dumps(Metadata(state_dict_metadata=entries, planner_data=paths, storage_data=storage))


def _located(
    files: Mapping[str, Sequence[Part]], places: Mapping[str, Sequence[Sequence[int]]]
) -> Iterator[tuple[str, Part, Any]]:
    for name, parts in files.items():
        for part, (offset, length) in zip(parts, places[name], strict=True):
            yield part.key, part, compat.StorageInfo(name, offset, length)
