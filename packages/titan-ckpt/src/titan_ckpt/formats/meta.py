"""Folders as Meta publishes Llama: `params.json`, and `consolidated.NN.pth` for each rank of model parallelism.

Each file holds a rank's share of every tensor: rows, columns, or (norms) all of it.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from titan_ckpt.errors import CheckpointError, DamagedCheckpointError
from titan_ckpt.formats.collection import Collection, Tensors
from titan_ckpt.formats.lazy import LazyTensor, concatenate, narrow
from titan_ckpt.formats.torch_file import read_torch_file
from titan_ckpt.place import Place

PARAMS_NAME = "params.json"
_SHARD = re.compile(r"consolidated\.(\d\d)\.pth")


def read_meta(place: Place, split: Mapping[str, int | None]) -> Collection:
    """The tensors of a folder, shards put together.

    Args:
        place: the folder.
        split: name of each tensor -> the dimension that is cut into shards, None if all shards have all of it.

    Raises:
        CheckpointError: if it holds no `consolidated.NN.pth`, or one that cannot be read.
    """
    sizes = {name: size for name, size in place.files().items() if _SHARD.fullmatch(name)}
    if not sizes:
        raise CheckpointError(f"{place} holds no consolidated.NN.pth files.")
    files = sorted(sizes)
    missing = sorted({shard_name(i) for i in range(int(files[-1][-6:-4]) + 1)} - set(files))
    problems = [f"{name} is missing, and {files[-1]} is there" for name in missing]
    parts = {name: read_torch_file(place, name)[0] for name in files}
    tensors = {}
    for key in dict.fromkeys(key for part in parts.values() for key in part.tensors):
        there = {name: part.tensors[key] for name, part in parts.items() if key in part.tensors}
        problems += [f"{key} is not in {name}" for name in files if name not in there]
        problems += _unequal(key, there)
        tensors[key] = _merged(place, key, list(there.values()), split.get(key))
    return Collection(place=place, format="Meta Llama", tensors=tensors, files=sizes, problems=tuple(problems))


def _unequal(key: str, shards: Mapping[str, LazyTensor]) -> list[str]:
    """Shards of one split are equal."""
    (first, one), *others = shards.items()
    return [
        f"{key} is {list(other.shape)} in {name} and {list(one.shape)} in {first}: they are of different splits"
        for name, other in others
        if other.shape != one.shape
    ]


def _merged(place: Place, key: str, shards: list[LazyTensor], dim: int | None) -> LazyTensor:
    if dim is not None:
        return concatenate(shards, dim)
    first = shards[0]

    def read(start: int, stop: int) -> Tensor:
        rows = first.read(start, stop)
        for other in shards[1:]:
            if not torch.equal(rows, other.read(start, stop)):
                names = ", ".join((*first.files, *other.files))
                raise DamagedCheckpointError(place, [f"{key} should be the same in {names}, and differs"])
        return rows

    return LazyTensor(first.dtype, first.shape, first.files, read)


def shards(tensors: Tensors, split: Mapping[str, int | None], count: int) -> dict[str, dict[str, LazyTensor]]:
    """Cuts tensors into `count` shards: name of each file and what goes into it.

    Raises:
        CheckpointError: naming the tensors that cannot be cut into that many equal parts.
    """
    odd = [
        f"{name} {list(tensor.shape)}"
        for name, tensor in tensors.items()
        if (dim := split.get(name)) is not None and tensor.shape[dim] % count
    ]
    if odd:
        raise CheckpointError(f"{count} shards don't divide {', '.join(odd)}; choose another number of shards.")
    return {
        shard_name(i): {name: _shard(tensor, split.get(name), i, count) for name, tensor in tensors.items()}
        for i in range(count)
    }


def _shard(tensor: LazyTensor, dim: int | None, index: int, count: int) -> LazyTensor:
    if dim is None or count == 1:
        return tensor
    size = tensor.shape[dim] // count
    return narrow(tensor, dim, index * size, size)


def shard_name(index: int) -> str:
    """The file of one rank of model parallelism."""
    return f"consolidated.{index:02}.pth"
