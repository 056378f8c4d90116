"""Folders as Hugging Face's transformers loads them: safetensors files, alone or in shards with an index."""

import json
from collections.abc import Mapping

from titan_ckpt.errors import CheckpointError, DamagedCheckpointError
from titan_ckpt.formats.collection import Collection, Tensors, listed
from titan_ckpt.formats.lazy import LazyTensor
from titan_ckpt.formats.safetensors import has_name, read_safetensors
from titan_ckpt.place import Place

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "LICENSE",
    "LICENSE.txt",
    "USE_POLICY.md",
)
"""Files beside the weights that go with them from one format into another."""


def read_hugging_face(place: Place) -> Collection:
    """The tensors of a folder; every fault of index and headers is in `problems`.

    Raises:
        CheckpointError: if the folder holds no safetensors files.
    """
    files = {name: size for name, size in place.files().items() if "/" not in name}
    shards = {name: size for name, size in files.items() if name.endswith(".safetensors")}
    if not shards:
        bins = any(name.endswith(".bin") for name in files)
        hint = " Its weights are pickled (*.bin): let transformers save them anew, as safetensors." if bins else ""
        raise CheckpointError(f"{place} holds no safetensors files.{hint}")
    problems: list[str] = []
    weight_map = _weight_map(place, problems) if INDEX_NAME in files else None
    wanted = set(weight_map.values()) if weight_map is not None else {SINGLE_NAME}
    strangers = sorted(shards.keys() - wanted)
    if weight_map is None and SINGLE_NAME not in shards:
        problems.append(f"{INDEX_NAME} is missing, without which nobody can tell what goes with {listed(strangers)}")
    else:
        named = INDEX_NAME if weight_map is not None else f"a lone {SINGLE_NAME}"
        problems += [f"{name} is missing, which {named} names" for name in sorted(wanted - shards.keys())]
        problems += [f"{name} is left over: {named} does not go with it" for name in strangers]
    tensors: dict[str, LazyTensor] = {}
    for name in sorted(shards.keys() & wanted):
        try:
            found = read_safetensors(place, name)
        except DamagedCheckpointError as damaged:
            problems += damaged.problems
            continue
        problems += [f"{key} is in {name} and in {tensors[key].files[0]}" for key in found.keys() & tensors.keys()]
        tensors |= found
        if weight_map is not None:
            expected = {key for key, shard in weight_map.items() if shard == name}
            problems += [f"{key} is in {name}, but not in {INDEX_NAME}" for key in sorted(found.keys() - expected)]
            problems += [
                f"{key} is not in {name}, where {INDEX_NAME} has it" for key in sorted(expected - found.keys())
            ]
    return Collection(
        place=place,
        format="Hugging Face safetensors",
        tensors=tensors,
        files={name: shards[name] for name in sorted(shards.keys() & wanted)},
        problems=tuple(problems),
    )


def _weight_map(place: Place, problems: list[str]) -> dict[str, str]:
    try:
        weight_map = json.loads(place.read(INDEX_NAME))["weight_map"]
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError("its weight_map has to name a file for each tensor")
        return weight_map
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{INDEX_NAME} cannot be read ({type(error).__name__}: {error})")
        return {}


def shards(tensors: Tensors, limit: int) -> tuple[dict[str, dict[str, LazyTensor]], dict[str, bytes]]:
    """Distributes tensors over files of about `limit` bytes, in their order.

    Returns:
        Name of each file and what goes into it; and the index, by its name, if there is more than one file.

    Raises:
        CheckpointError: if the format has no name for a dtype.
    """
    unknown = sorted({str(tensor.dtype) for tensor in tensors.values() if not has_name(tensor.dtype)})
    if unknown:
        raise CheckpointError(f"safetensors files cannot hold {', '.join(unknown)}; choose another dtype.")
    groups: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}, {}
    files = {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}
    return files, {INDEX_NAME: _index(files)}


def _index(files: Mapping[str, Mapping[str, LazyTensor]]) -> bytes:
    total = sum(tensor.nbytes for group in files.values() for tensor in group.values())
    weight_map = {name: file for file, group in files.items() for name in group}
    body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(body, indent=2) + "\n").encode()
