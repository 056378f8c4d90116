"""Puts a checkpoint's content into objects that are there already, on whatever layout they have now.

Names, shapes and dtypes of everything are compared, on all ranks, before anything is touched.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from titan_ckpt.checkpoint import Checkpoint
from titan_ckpt.contents import own_trees
from titan_ckpt.errors import CheckpointError
from titan_ckpt.state import Flat, Stateful, check_names, flatten, with_values
from titan_ckpt.world import World

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata


def restore(
    world: World,
    checkpoint: Checkpoint,
    state: Mapping[str, Stateful],
    per_rank: Mapping[str, Stateful],
    skip: Collection[str],
) -> None:
    """Restores all objects; called by all ranks.

    Raises:
        CheckpointError: on every rank, listing all differences, before anything has changed.
        RanksFailedError: on every rank, if any failed; the objects may be restored in part.
    """
    from titan_ckpt import dcp  # 0.8 s, which a run that neither saves nor loads does not pay

    def prepare() -> tuple[dict[str, Any], Flat, "Metadata", dict[str, Any]]:
        check_names(state, per_rank)
        trees = {name: part.state_dict() for name, part in state.items()} | own_trees(world.rank, per_rank)
        return trees, flatten(trees), dcp.read_metadata(checkpoint.place), checkpoint.read_values()

    trees, flat, metadata, values = world.together(prepare)
    _compare(world, checkpoint, flat, dcp.tensor_entries(metadata), values, skip)
    world.together(lambda: dcp.read(checkpoint.place, flat.tensors, metadata))

    def hand_over() -> None:
        for name, part in state.items():
            part.load_state_dict(with_values(trees[name], values, name))
        for name, part in per_rank.items():
            ((_, own),) = with_values(trees[name], values, name).items()
            part.load_state_dict(own)

    world.together(hand_over)


def _compare(
    world: World,
    checkpoint: Checkpoint,
    flat: Flat,
    entries: Mapping[str, "TensorStorageMetadata"],
    values: Mapping[str, Any],
    skip: Collection[str],
) -> None:
    """Raises CheckpointError, on every rank, if the checkpoint and what the ranks have differ anywhere."""
    missing = [key for key in flat.tensors if key not in entries]
    missing += [key for key in flat.values if key not in values]
    different = []
    for key in flat.tensors.keys() & entries.keys():
        there = _form(entries[key].properties.dtype, entries[key].size)
        here = _form(flat.tensors[key].dtype, flat.tensors[key].shape)
        if flat.tensors[key].is_meta:
            different.append(f"{key} (has no memory here: its device is meta)")
        elif there != here:
            different.append(f"{key} (saved as {there}, is {here})")
    keys = sorted([*flat.tensors, *flat.values])
    found = world.gather_distinct([keys, sorted(missing), sorted(different)])
    wanted, missing, different = (sorted({text for part in found for text in part[kind]}) for kind in range(3))

    manifest = checkpoint.manifest
    asked = {key.partition(".")[0] for key in wanted}
    names = {*manifest.state, *manifest.per_rank} - set(skip)
    extra = {
        key if key.partition(".")[0] in asked else f"{key.partition('.')[0]}.*"
        for key in {*entries, *values} - set(wanted)
        if key.partition(".")[0] in names
    }
    differences = [
        f"{title}: {', '.join(texts)}."
        for title, texts in (
            ("Not in it", missing),
            ("In it, but not asked for", sorted(extra)),
            ("Different", different),
        )
        if texts
    ]
    if differences:
        raise CheckpointError(
            f"The checkpoint {checkpoint.place} does not fit, and nothing was restored. {' '.join(differences)} Give "
            "the objects that were saved, of the same structure, and name those to leave out in `skip`."
        )


def _form(dtype: object, shape: Collection[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
