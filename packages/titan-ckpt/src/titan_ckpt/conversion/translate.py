"""Plans for a model's weights out of one format into another, by key maps and facts that the caller brings.

    native = from_hugging_face(place, keys, facts)        from_dcp, from_meta: what the source holds, by native names
    plan = to_dcp(native, destination, files=…)           to_hugging_face, to_meta: see `titan_ckpt.conversion.plan`

Nothing but headers is read before the plan is carried out, except tensors that a model shares and a source has twice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from titan_ckpt.contents import FILES_FOLDER
from titan_ckpt.conversion.keymap import KeyMap, Mapped, ModelFacts, rows, to_foreign, to_native
from titan_ckpt.conversion.layouts import VERSIONS, CheckpointLayout, SealedLayout
from titan_ckpt.conversion.plan import Counter, Plan, PlannedFile, Progress, no_progress
from titan_ckpt.directory import is_checkpoint, step_of
from titan_ckpt.errors import CheckpointError, DamagedCheckpointError
from titan_ckpt.formats import hugging_face, meta
from titan_ckpt.formats.collection import Collection, Tensors
from titan_ckpt.formats.dcp_folder import files_of_parts, read_dcp
from titan_ckpt.formats.lazy import LazyTensor, cast
from titan_ckpt.formats.safetensors import safetensors_size, write_safetensors
from titan_ckpt.formats.torch_file import write_torch_file
from titan_ckpt.location import Location, place_of
from titan_ckpt.manifest import MANIFEST_NAME, Json, Manifest
from titan_ckpt.place import Place
from titan_ckpt.storage import HashingFile

SHARD_BYTES = 1_000_000_000  # several files are written at a time, and whole ones are kept when it is interrupted
MODEL = "model"
_NOT_MODEL = ("optimizer", "lr_scheduler", "dataloader", "train_state", "epochs_run", "steps_run", "seed", "rng_state")

_ANOTHER_PROJECT = "they are those of another project or of another model (titan-convert: see --keys and --config)"


@dataclass(frozen=True, kw_only=True)
class Native:
    """A source, seen as the native model."""

    collection: Collection
    mapped: Mapped
    facts: ModelFacts
    elsewhere: str = "the weights are those of another model than the configuration"
    """What to say if most of the names are missing."""

    @property
    def problems(self) -> tuple[str, ...]:
        """Of the files, which may be why names are missing; of the names as a whole; and of each."""
        mapped = self.mapped
        table = {name for row in mapped.rows if row.shares is None for name in row.foreign}
        missing = len(table - self.collection.tensors.keys())
        if 2 * missing <= len(table) or self.collection.problems:
            return (*self.collection.problems, *mapped.problems)
        cause = f"{missing:,} of the {len(table):,} names of this model are not there: {self.elsewhere}"
        return (cause, *mapped.problems)


def from_hugging_face(source: Location, keys: KeyMap, facts: ModelFacts, derived: Sequence[str] = ()) -> Native:
    """A folder of safetensors files.

    Raises:
        CheckpointError: if it holds none.
    """
    return _native(hugging_face.read_hugging_face(place_of(source)), keys, facts, derived)


def from_meta(source: Location, keys: KeyMap, facts: ModelFacts, derived: Sequence[str] = ()) -> Native:
    """A folder of `consolidated.NN.pth` files.

    Raises:
        CheckpointError: if it holds none, or one that cannot be read.
    """
    return _native(meta.read_meta(place_of(source), splits(keys, facts)), keys, facts, derived)


def from_dcp(
    source: Location,
    keys: KeyMap | None,
    facts: ModelFacts,
    derived: Sequence[str] = (),
    under: str | None = MODEL,
    rewrite: Callable[[Tensors], Tensors] = lambda tensors: tensors,
) -> Native:
    """A checkpoint of this package, or any folder in DCP layout.

    Args:
        source: the folder.
        keys: None for native names.
        facts: of the model that is expected.
        derived: foreign names to pass over.
        under: the object in the folder that is the model; None if its names stand alone.
        rewrite: makes the model's tensors of those in the folder.

    Raises:
        CheckpointError: if it is no such folder.
        DamagedCheckpointError: if its metadata cannot be read.
    """
    found = model_of(read_dcp(place_of(source)), under)
    native = _native(replace(found, tensors=dict(rewrite(found.tensors))), keys, facts, derived)
    return replace(native, elsewhere=_ANOTHER_PROJECT)


def model_of(collection: Collection, under: str | None) -> Collection:
    """What belongs to the model among all that a training run has saved."""
    if under is None:
        kept = {name: tensor for name, tensor in collection.tensors.items() if name.partition(".")[0] not in _NOT_MODEL}
    else:
        start = f"{under}."
        kept = {name.removeprefix(start): t for name, t in collection.tensors.items() if name.startswith(start)}
    return Collection(
        place=collection.place,
        format=collection.format,
        tensors=kept,
        files={name: collection.files[name] for tensor in kept.values() for name in tensor.files},
        problems=collection.problems,
    )


def _native(collection: Collection, keys: KeyMap | None, facts: ModelFacts, derived: Sequence[str]) -> Native:
    mapped = to_native(collection.tensors, keys, facts, derived, str(collection.place))
    return Native(collection=collection, mapped=mapped, facts=facts)


def splits(keys: KeyMap, facts: ModelFacts) -> dict[str, int | None]:
    """Foreign name -> the dimension that model parallelism cuts."""
    return {name: row.split for row in rows(keys, facts) for name in row.foreign}


def verified(source: Location, *, hashes: bool = True, progress: Progress = no_progress) -> Manifest | None:
    """The manifest of a checkpoint of this package, with which its files agree; None for a plain DCP folder.

    Raises:
        CheckpointError: if `source` is no folder in DCP layout.
        DamagedCheckpointError: naming the files that are not what was written.
    """
    place = place_of(source)
    if not is_checkpoint(place):
        raise CheckpointError(f"{place} is no checkpoint: it has neither a manifest nor a .metadata file.")
    if MANIFEST_NAME not in place.files():
        return None
    manifest = Manifest.read(place)
    with Counter(progress, "verifying", sum(record.size for record in manifest.files.values())) as counter:
        problems = manifest.damage(place, hashes=hashes, progress=counter)
    if problems:
        raise DamagedCheckpointError(place, problems)
    return manifest


def carried_files(source: Location) -> dict[str, bytes]:
    """Small files that go with a model: `files/` of a checkpoint, tokenizer and configuration files of a folder."""
    place = place_of(source)
    names = place.files()
    start = f"{FILES_FOLDER}/"
    if MANIFEST_NAME in names:
        return {name.removeprefix(start): place.read(name) for name in names if name.startswith(start)}
    wanted = (hugging_face.CONFIG_NAME, meta.PARAMS_NAME, *hugging_face.CARRIED)
    return {name: place.read(name) for name in wanted if name in names}


def to_dcp(
    native: Native,
    destination: Location,
    *,
    keys: KeyMap | None = None,
    under: str | None = MODEL,
    dtype: torch.dtype | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Plan:
    """Plans a checkpoint that holds the model alone, with `files` beside it.

    Args:
        native: the source.
        destination: a folder; its step is that in its name if it is `step-N`, else 0.
        keys: of the names in the result; None for the native ones.
        under: the object that the names are put under; None: they stand alone.
        dtype: of floating-point tensors; None: that of the source.
        files: what is kept in `files/`, by name.
    """
    place = place_of(destination)
    tensors, shared = to_foreign(native.mapped.tensors, keys, native.facts)
    start = f"{under}." if under else ""
    tensors = {f"{start}{name}": _in(dtype, tensor) for name, tensor in tensors.items()}
    layout = CheckpointLayout(
        tensors=tensors,
        shared={f"{start}{name}": f"{start}{other}" for name, other in shared.items()},
        parts=files_of_parts(tensors),
        under=under,
        step=step_of(place.name) or 0,
        files=files or {},
        meta={"converted_from": str(native.collection.place)},
    )
    return _plan(native, place, layout.data_files(), layout, tensors, keys, {"under": under})


def to_hugging_face(
    native: Native,
    destination: Location,
    *,
    keys: KeyMap,
    dtype: torch.dtype | None = None,
    files: Mapping[str, bytes],
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """Plans a folder that `from_pretrained` of transformers loads.

    Args:
        native: the source.
        destination: a folder.
        keys: of the names in the result.
        dtype: of floating-point tensors; None: that of the source.
        files: config.json and what else goes beside the weights, by name.
        shard_bytes: size of a file; a larger tensor has one of its own.
    """
    tensors, _ = to_foreign(native.mapped.tensors, keys, native.facts)
    tensors = {name: _in(dtype, tensor) for name, tensor in tensors.items()}
    groups, index = hugging_face.shards(tensors, shard_bytes)
    planned = [
        PlannedFile(name, safetensors_size(group), _content(write_safetensors, group)) for name, group in groups.items()
    ]
    layout = SealedLayout(files={**files, **index}, meta={"converted_from": str(native.collection.place)})
    return _plan(native, place_of(destination), planned, layout, tensors, keys, {"shard_bytes": shard_bytes})


def to_meta(
    native: Native,
    destination: Location,
    *,
    keys: KeyMap,
    dtype: torch.dtype | None = None,
    files: Mapping[str, bytes],
    shards: int = 1,
) -> Plan:
    """Plans a folder in the format of Meta's Llama: `files` has params.json, `shards` are ranks of model parallelism.

    Raises:
        CheckpointError: if the tensors cannot be cut into that many shards.
    """
    tensors, shared = to_foreign(native.mapped.tensors, keys, native.facts)
    tensors = {name: _in(dtype, tensor) for name, tensor in tensors.items()}
    tensors |= {name: tensors[other] for name, other in shared.items()}
    groups = meta.shards(tensors, splits(keys, native.facts), shards)
    planned = [PlannedFile(name, _nbytes(group), _content(write_torch_file, group)) for name, group in groups.items()]
    layout = SealedLayout(files=files, meta={"converted_from": str(native.collection.place)})
    return _plan(native, place_of(destination), planned, layout, tensors, keys, {"shards": shards})


def _plan(
    native: Native,
    destination: Place,
    files: Sequence[PlannedFile],
    layout: CheckpointLayout | SealedLayout,
    tensors: Tensors,
    keys: KeyMap | None,
    options: Mapping[str, Json],
) -> Plan:
    forms = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    table = _table(native, keys)
    return Plan(
        source=native.collection.place,
        destination=destination,
        files=files,
        layout=layout,
        fingerprint={**source_fingerprint(native.collection), "options": options, "result": forms, "table": table},
        problems=native.problems,
        table=table,
        tensors=len(tensors),
        nbytes=_nbytes(tensors),
    )


def source_fingerprint(collection: Collection) -> dict[str, Json]:
    """What tells whether a source is still the same: names, sizes, and on a disk the times of its files."""
    folder = collection.place.path
    times = {name: folder.joinpath(name).stat().st_mtime_ns for name in collection.files} if folder else {}
    sizes = dict(collection.files)
    return {"versions": dict(VERSIONS), "source": str(collection.place), "sizes": sizes, "times": times}


def _table(native: Native, keys: KeyMap | None) -> list[tuple[str, str, str]]:
    target = {row.native: row for row in rows(keys, native.facts)}
    table = []
    for row in native.mapped.rows:
        result = target[row.native]
        words = [f"{word} (source)" for word in row.words] + [f"{word} (result)" for word in result.words]
        if row.shares is not None:
            words.append(f"the same as {row.shares}")
        table.append((_short(row.foreign), _short(result.foreign), ", ".join([str(list(row.shape)), *words])))
    return table


def _short(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def _content(write: Callable[[HashingFile, Tensors], None], group: Tensors) -> Callable[[HashingFile], Json]:
    def content(file: HashingFile) -> Json:
        write(file, group)
        return None

    return content


def _in(dtype: torch.dtype | None, tensor: LazyTensor) -> LazyTensor:
    return cast(tensor, dtype) if dtype is not None and tensor.dtype.is_floating_point else tensor


def _nbytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
