"""The conversions between model formats: joins titan-models' tables with titan-ckpt's engine, a few lines each."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from titan_ckpt.conversion.plan import Plan
from titan_ckpt.conversion.translate import (
    SHARD_BYTES,
    Native,
    carried_files,
    from_dcp,
    from_hugging_face,
    from_meta,
    to_dcp,
    to_hugging_face,
    to_meta,
    verified,
)
from titan_ckpt.errors import CheckpointError
from titan_ckpt.formats import hugging_face as hf_format
from titan_ckpt.formats import meta as meta_format
from titan_ckpt.place import Place
from titan_convert import models
from titan_convert.models import Model
from titan_models import meta, model_file
from titan_models.hugging_face_files import settings_files
from titan_models.shape import ModelConfigError


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user may choose beside source and destination."""

    keys: str = "titan"
    """Who reads or writes the DCP side."""

    config: str | None = None
    """What says which model a DCP folder holds, if it doesn't."""

    dtype: str | None = None
    """Of the result, in torch's words; None: as in the source."""

    shards: int = 1
    """Ranks of model parallelism of a Meta folder."""

    shard_bytes: int = SHARD_BYTES
    """Size of a safetensors file."""


@dataclass(frozen=True)
class Source:
    """A folder whose model is known."""

    model: Model
    native: Native
    files: Mapping[str, bytes]
    """What goes with the model."""


def plan(command: str, src: Place, dst: Place, options: Options) -> Plan:
    """The plan of one of the commands between model formats.

    Raises:
        CheckpointError: if the source is not of the format that the command names, or its model cannot be expressed in
            that of the result.
    """
    from_format, to_format = command.split("-to-")
    source = read(from_format, src, options)
    try:
        return _WRITERS[to_format](source, dst, options)
    except ModelConfigError as error:
        raise CheckpointError(f"{src} cannot be converted. {error}") from error


def read(name: str, place: Place, options: Options) -> Source:
    """Opens a folder in the format that a command names: `hf`, `dcp` or `llama`."""
    if not place.exists():
        raise CheckpointError(f"{place} does not exist.")
    if place.path is not None and not place.path.is_dir():
        raise CheckpointError(f"{place} is a file, and a folder is wanted: name the one that it is in, {place.parent}.")
    if name == "hf":
        model = models.of_hugging_face(place)
        native = from_hugging_face(place, model.table("hf"), model.facts, model.derived)
        return Source(model, native, carried_files(place))
    if name == "llama":
        model = models.of_meta(place)
        native = from_meta(place, model.table("meta"), model.facts, model.derived)
        return Source(model, native, carried_files(place))
    verified(
        place, hashes=False
    )  # the hashes take as long as the conversion: see `titan_ckpt.conversion.survey.verifying`
    model = models.of_checkpoint(place, options.config)
    native = from_dcp(place, model.keys(options.keys), model.facts, model.derived, models.UNDER[options.keys])
    return Source(model, native, carried_files(place))


def _to_dcp(source: Source, dst: Place, options: Options) -> Plan:
    return to_dcp(
        source.native,
        dst,
        keys=source.model.keys(options.keys),
        under=models.UNDER[options.keys],
        dtype=_dtype(options),
        files={**source.files, model_file.MODEL_FILE: model_file.to_json(source.model.config).encode()},
    )


def _to_hugging_face(source: Source, dst: Place, options: Options) -> Plan:
    tokenizer = {name: source.files[name] for name in hf_format.CARRIED if name in source.files}
    return to_hugging_face(
        source.native,
        dst,
        keys=source.model.table("hf"),
        dtype=_dtype(options),
        files={**tokenizer, **settings_files(source.model.config, _dtype_name(source, options), source.files)},
        shard_bytes=options.shard_bytes,
    )


def _to_meta(source: Source, dst: Place, options: Options) -> Plan:
    params = json.dumps(meta.to_meta(source.model.config)).encode()
    if (heads := source.model.config.kv_heads) % options.shards:
        raise CheckpointError(
            f"{options.shards} shards don't divide the {heads} heads of keys, and a shard has whole heads; choose a "
            "divisor."
        )
    tokenizer = {name: content for name, content in source.files.items() if name == "tokenizer.model"}
    return to_meta(
        source.native,
        dst,
        keys=source.model.table("meta"),
        dtype=_dtype(options),
        files={**tokenizer, meta_format.PARAMS_NAME: params},
        shards=options.shards,
    )


_WRITERS = {"dcp": _to_dcp, "hf": _to_hugging_face, "llama": _to_meta}


def _dtype(options: Options) -> torch.dtype | None:
    return None if options.dtype is None else getattr(torch, options.dtype)


def _dtype_name(source: Source, options: Options) -> str:
    """The dtype that most of the result's bytes have."""
    if options.dtype is not None:
        return options.dtype
    sizes: dict[torch.dtype, int] = {}
    for tensor in source.native.mapped.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return str(max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)).removeprefix("torch.")
