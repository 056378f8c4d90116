"""Fills the folder of a checkpoint: tensors, values, files, and last the manifest that makes it one.

    .metadata  __0_0.distcp …   the tensors, in PyTorch's Distributed Checkpoint layout
    state.json                  what is not a tensor, as JSON values by key
    files/                      the files that the caller added: config, tokenizer, …
    manifest.json               every other file with its size and SHA-256

Three steps: `take` asks the objects for their state, on each rank for itself; `agree` puts together what they have;
`write_contents` writes. Assumes that all ranks reach the same folder, which is checked before the manifest is written.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import torch

from titan_ckpt import __version__
from titan_ckpt.errors import CheckpointError
from titan_ckpt.location import Location, place_of
from titan_ckpt.manifest import MANIFEST_NAME, Json, Manifest
from titan_ckpt.state import Stateful, check_names, flatten, is_json, tensors_only
from titan_ckpt.world import World

if TYPE_CHECKING:
    from titan_ckpt.dcp import Share

STATE_NAME = "state.json"
FILES_FOLDER = "files"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a checkpoint is to hold."""

    share: "Share"
    """The tensors that this rank has."""

    values: Mapping[str, Json]
    """By key."""

    state: Sequence[str]
    """Names of the saved objects."""

    step: int
    """Optimizer steps taken."""

    own_values: Mapping[str, Json] = field(default_factory=dict)
    """By key; those of which every rank has its own, until the ranks have agreed."""

    per_rank: Sequence[str] = ()
    """Names of the objects of which every rank saves its own."""

    meta: Mapping[str, Json] = field(default_factory=dict)
    """What the caller wants to remember; rank 0's counts."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    """Contents of small files by name; rank 0's count."""

    permanent: bool = False
    """Whether no later save may retire it."""


def take(
    rank: int,
    step: int,
    state: Mapping[str, Stateful],
    per_rank: Mapping[str, Stateful],
    *,
    meta: Mapping[str, Json],
    files: Mapping[str, bytes],
    permanent: bool,
) -> Contents:
    """Asks the objects of one rank for their state; values, meta and files are copied, tensors are not.

    Raises:
        ValueError: if something cannot be saved.
    """
    from titan_ckpt import dcp  # 0.8 s, which a run that neither saves nor loads does not pay

    check_names(state, per_rank)
    shared = {name: part.state_dict() for name, part in state.items()}
    own = own_trees(rank, per_rank)
    if not is_json(meta):
        raise ValueError("meta holds something that is no JSON value; keys are strings, tensors are state")
    return Contents(
        share=dcp.share_of(tensors_only({**shared, **own}), is_first=rank == 0),
        values=copy.deepcopy(flatten(shared).values),
        own_values=copy.deepcopy(flatten(own).values),
        state=sorted(state),
        step=step,
        per_rank=sorted(per_rank),
        meta=copy.deepcopy(dict(meta)),
        files={_checked_name(name): bytes(content) for name, content in files.items()},
        permanent=permanent,
    )


def agree(world: World, contents: Contents) -> Contents:
    """What the ranks have taken, put together; only the tensors stay each rank's own.

    Raises:
        RanksFailedError: if a value differs between the ranks that have it.
    """
    values = world.together(_merger(world.gather_distinct(contents.values)))
    for part in world.gather(contents.own_values):
        values |= part
    names = {name for group in world.gather_distinct(contents.state) for name in group}
    return replace(contents, values=values, own_values={}, state=sorted(names))


def own_trees(rank: int, per_rank: Mapping[str, Stateful]) -> dict[str, Any]:
    """The states of which every rank has its own, under keys that tell the ranks apart."""
    return {name: {f"rank-{rank}": part.state_dict()} for name, part in per_rank.items()}


def write_contents(
    world: World, folder: Location, contents: Contents, on_write: Callable[[int], object] = lambda size: None
) -> None:
    """Writes everything into an empty folder; called by all ranks.

    `on_write` is called with the number of bytes each time some bytes of tensors have been written.

    Raises:
        RanksFailedError: on every rank, if any could not write its part.
    """
    from titan_ckpt import dcp  # 0.8 s, which a run that neither saves nor loads does not pay

    place = place_of(folder)
    records = dcp.write(place, contents.share, world, on_write)

    def finish() -> None:
        records[STATE_NAME] = place.write(STATE_NAME, json.dumps(contents.values, indent=1).encode())
        for name, content in contents.files.items():
            stored = f"{FILES_FOLDER}/{name}"
            records[stored] = place.write(stored, content)
        manifest = Manifest(
            step=contents.step,
            world_size=world.size,
            state=tuple(contents.state),
            per_rank=tuple(contents.per_rank),
            meta=contents.meta,
            versions={"titan-ckpt": __version__, "torch": torch.__version__},
            permanent=contents.permanent,
            files=records,
        )
        unseen = manifest.damage(place, hashes=False)
        if unseen:
            raise CheckpointError(
                f"rank 0 does not see what other ranks have written ({'; '.join(unseen)}); "
                "the checkpoint directory must be on a file system that all ranks share"
            )
        place.write(MANIFEST_NAME, manifest.to_bytes())

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
