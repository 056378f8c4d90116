"""Fills the folder of a checkpoint: tensors, values, files, and last the manifest that makes it one.

    .metadata  __0_0.distcp …   the tensors, in PyTorch's Distributed Checkpoint layout
    state.json                  what is not a tensor, as JSON values by key
    files/                      the files that the caller added: config, tokenizer, …
    manifest.json               every other file with its size and SHA-256

Assumes that all ranks share the file system, which is checked before the manifest is written.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from titan_ckpt import __version__
from titan_ckpt.errors import CheckpointError
from titan_ckpt.manifest import MANIFEST_NAME, Json, Manifest
from titan_ckpt.state import Stateful, check_names, flatten, is_json, tensors_only
from titan_ckpt.storage import write_file
from titan_ckpt.world import World

STATE_NAME = "state.json"
FILES_FOLDER = "files"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a checkpoint is to hold."""

    tensors: dict[str, Any]
    """Nested by the components of their keys; this rank's."""

    values: Mapping[str, Json]
    """By key; of all ranks."""

    state: Sequence[str]
    """Names of the saved objects; of all ranks."""

    per_rank: Sequence[str]
    """Names of the objects of which every rank saves its own."""


def collect(world: World, state: Mapping[str, Stateful], per_rank: Mapping[str, Stateful]) -> Contents:
    """Asks the objects for their state, on every rank.

    Raises:
        RanksFailedError: if a leaf cannot be saved, or a value differs between the ranks that have it.
    """

    def ask() -> tuple[dict[str, Any], dict[str, Json], dict[str, Json]]:
        check_names(state, per_rank)
        shared = {name: part.state_dict() for name, part in state.items()}
        own = own_trees(world.rank, per_rank)
        return tensors_only({**shared, **own}), flatten(shared).values, flatten(own).values

    tensors, shared, own = world.together(ask)
    values = world.together(_merger(world.gather_distinct(shared)))
    for part in world.gather(own):
        values |= part
    names = {name for group in world.gather_distinct(sorted(state)) for name in group}
    return Contents(tensors=tensors, values=values, state=sorted(names), per_rank=sorted(per_rank))


def own_trees(rank: int, per_rank: Mapping[str, Stateful]) -> dict[str, Any]:
    """The states of which every rank has its own, under keys that tell the ranks apart."""
    return {name: {f"rank-{rank}": part.state_dict()} for name, part in per_rank.items()}


def write_contents(
    world: World,
    folder: Path,
    contents: Contents,
    *,
    step: int,
    meta: Mapping[str, Json],
    files: Mapping[str, bytes],
    on_write: Callable[[int], object] = lambda size: None,
) -> None:
    """Writes everything into an existing, empty folder; called by all ranks, `meta` and `files` of rank 0 count.

    `on_write` is called with the number of bytes each time some bytes of tensors have been written.

    Raises:
        RanksFailedError: on every rank, if any could not write its part.
    """
    from titan_ckpt import dcp  # 0.8 s, which a run that neither saves nor loads does not pay

    written = world.gather(world.together(lambda: dcp.write(folder, contents.tensors, world.rank, on_write)))
    records = {name: record for part in written for name, record in part.items()}

    def finish() -> None:
        records[STATE_NAME] = write_file(folder / STATE_NAME, json.dumps(contents.values, indent=1).encode())
        for name, content in files.items():
            stored = f"{FILES_FOLDER}/{_checked_name(name)}"
            records[stored] = write_file(folder / stored, content)
        if not is_json(meta):
            raise ValueError("meta holds something that is no JSON value; keys are strings, tensors are state")
        manifest = Manifest(
            step=step,
            world_size=world.size,
            state=tuple(contents.state),
            per_rank=tuple(contents.per_rank),
            meta=dict(meta),
            versions={"titan-ckpt": __version__, "torch": torch.__version__},
            files=records,
        )
        unseen = manifest.damage(folder, hashes=False)
        if unseen:
            raise CheckpointError(
                f"rank 0 does not see what other ranks have written ({'; '.join(unseen)}); "
                "the checkpoint directory must be on a file system that all ranks share"
            )
        write_file(folder / MANIFEST_NAME, manifest.to_bytes())

    world.first(finish)


def _merger(parts: Sequence[Mapping[str, Json]]) -> Callable[[], dict[str, Json]]:
    """Puts the values of all ranks together, or says which of them are not the same on all ranks."""

    def merge() -> dict[str, Json]:
        merged: dict[str, Json] = {}
        conflicts = set()
        for part in parts:
            for key, value in part.items():
                # By their text, since nan is not equal to itself.
                if json.dumps(merged.setdefault(key, value)) != json.dumps(value):
                    conflicts.add(key)
        if conflicts:
            raise ValueError(
                f"These values differ between ranks: {', '.join(sorted(conflicts))}. Save what each rank has of its "
                "own in `per_rank`"
            )
        return merged

    return merge


def _checked_name(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or name == ".":
        raise ValueError(f"{name!r} is no name for a file in a checkpoint: give a plain relative one")
    return name
