"""`inspect` and `verify`: what a folder or file is, and whether it is whole."""

import argparse
import sys
from collections.abc import Mapping, Sequence

from titan_ckpt.conversion.survey import DESCRIPTIONS, Format, detect, read_any, survey
from titan_ckpt.conversion.survey import verify as verify_place
from titan_ckpt.errors import CheckpointError
from titan_ckpt.formats.collection import Collection, listed
from titan_ckpt.location import place_of
from titan_ckpt.place import Place
from titan_convert import models
from titan_convert.convert import Options, read
from titan_convert.models import Model
from titan_convert.progress import ProgressLine, size_text
from titan_models.facts import active_parameter_count, parameter_count
from titan_models.meta import PARAMS_FILE

READERS: Mapping[Format, str] = {"checkpoint": "dcp", "dcp": "dcp", "hf": "hf", "llama": "llama"}
"""Format that may say which model it holds -> its name in the commands."""


def inspect(options: argparse.Namespace, progress: ProgressLine) -> int:
    """What a folder or file is; 1 if it is not whole, as far as headers tell."""
    place = place_of(options.path)
    kind = detect(place)
    model, said = None, ""
    if kind in READERS:
        try:
            model = model_of(place, kind)
        except CheckpointError as error:
            said = str(error)
    collection = read_any(place, meta_splits(model))
    counted = survey(collection)
    lines = {
        "format": DESCRIPTIONS[kind],
        "model": _described(model) if model is not None else said or "not told",
        "tensors": f"{counted.tensors:,}" + (f", and {counted.others:,} other entries" if counted.others else ""),
        "parameters": f"{counted.parameters:,}",
        "bytes": size_text(counted.nbytes),
        "dtypes": ", ".join(f"{dtype} {size_text(size)}" for dtype, size in counted.dtypes.items()) or "none",
        "files": f"{len(counted.files):,}: " + listed(f"{n} ({size_text(s)})" for n, s in counted.files.items()),
    }
    for name, text in lines.items():
        print(f"{name:<11}{text}")
    if options.tensors:
        _print_tensors(collection)
    for problem in counted.problems:
        print(f"problem    {problem}")
    return 1 if counted.problems else 0


def _described(model: Model) -> str:
    config = model.config
    total, active = parameter_count(config), active_parameter_count(config)
    experts = f", {config.moe.experts} experts, {active:,} active" if config.moe is not None else ""
    scaled = f" scaled by {config.rope_scaling.factor:g}" if config.rope_scaling is not None else ""
    return (
        f"{type(config).__name__}, {total:,} parameters{experts}: {config.layers} layers, dim {config.dim}, "
        f"{config.heads} heads of {config.head_dim}, {config.kv_heads} of keys, vocabulary {config.vocab_size:,}, "
        f"RoPE base {config.rope_theta:g}{scaled}, head {'tied' if config.tie_embeddings else 'of its own'}"
    )


def _print_tensors(collection: Collection) -> None:
    width = max((len(name) for name in collection.tensors), default=0)
    for name, tensor in collection.tensors.items():
        form = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        print(f"{name:<{width}}  {form:<28}  {', '.join(tensor.files)}")


def model_of(place: Place, kind: Format, config: str | None = None) -> Model:
    """The model that a folder holds; `config` is for a DCP folder that doesn't say it."""
    if kind == "hf":
        return models.of_hugging_face(place)
    return models.of_meta(place) if kind == "llama" else models.of_checkpoint(place, config)


def meta_splits(model: Model | None) -> dict[str, int | None]:
    """Which dimension of each tensor model parallelism cuts in Meta's format; nothing if the model is not known."""
    from titan_ckpt.conversion.translate import splits

    keys = {} if model is None else getattr(sys.modules[model.family], "KEYS", {})
    return splits(keys["meta"], model.facts) if model is not None and "meta" in keys else {}


def verify(options: argparse.Namespace, progress: ProgressLine) -> int:
    """Whether a folder or file is whole."""
    place = place_of(options.path)
    problems, looked_at = verify_place(place, progress)
    if detect(place) == "llama":
        problems += [problem for problem in _against_params(place) if problem not in problems]
        looked_at += f", and shapes by {PARAMS_FILE}"
    for problem in problems:
        print(f"{place}: {problem}", file=sys.stderr)
    print(f"{'damaged' if problems else 'whole'}: {place} ({looked_at})")
    return 1 if problems else 0


def _against_params(place: Place) -> Sequence[str]:
    """A last shard that is missing, or shards of another split, show only in the shapes."""
    try:
        return read("llama", place, Options()).native.problems
    except CheckpointError as error:
        return [str(error).removesuffix(".")]
