"""The commands that only look: `inspect`, `diff` and `verify`."""

import argparse
import contextlib
import sys

from titan_ckpt.compare import differences
from titan_ckpt.errors import CheckpointError
from titan_ckpt.formats.collection import Collection, Tensors, listed
from titan_ckpt.place import Place, place_of
from titan_ckpt.plan import Counter
from titan_ckpt.survey import DESCRIPTIONS, Format, detect, read_any, survey
from titan_ckpt.survey import verify as verify_place
from titan_convert import models
from titan_convert.convert import Options, read
from titan_convert.models import Model
from titan_convert.progress import ProgressLine, size_text
from titan_models.facts import active_parameter_count, parameter_count

_READERS: dict[Format, str] = {"checkpoint": "dcp", "dcp": "dcp", "hf": "hf", "llama": "llama"}


def inspect(options: argparse.Namespace, progress: ProgressLine) -> int:
    """What a folder or file is; 1 if it is not whole, as far as headers tell."""
    place = place_of(options.path)
    kind = detect(place)
    model, said = None, ""
    if kind in _READERS:
        try:
            model = _model(place, kind, None)
        except CheckpointError as error:
            said = str(error)
    collection = read_any(place, _split(model))
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


def _model(place: Place, kind: Format, config: str | None) -> Model:
    if kind == "hf":
        return models.of_hugging_face(place)
    return models.of_meta(place) if kind == "llama" else models.of_checkpoint(place, config)


def _split(model: Model | None) -> dict[str, int | None]:
    from titan_ckpt.translate import splits

    keys = {} if model is None else getattr(sys.modules[model.family], "KEYS", {})
    return splits(keys["meta"], model.facts) if model is not None and "meta" in keys else {}


def diff(options: argparse.Namespace, progress: ProgressLine) -> int:
    """Every difference; 0 if there is none."""
    places = [place_of(options.one), place_of(options.other)]
    kinds = [detect(place) for place in places]
    alike = len({_READERS.get(kind, kind) for kind in kinds}) == 1
    one, other = (_tensors(place, kind, alike, options) for place, kind in zip(places, kinds, strict=True))
    found = 0
    with Counter(progress, "comparing", sum(tensor.nbytes for tensor in one.values())) as count:
        for difference in differences(one, other, count):
            found += 1
            largest = "" if difference.largest is None else f", the largest difference is {difference.largest:.6g}"
            print(f"{difference.name}: {difference.what}: {difference.detail}{largest}")
    print(f"{found:,} of {len({*one, *other}):,} tensors differ" if found else f"equal: {len(one):,} tensors")
    return 1 if found else 0


def _tensors(place: Place, kind: Format, alike: bool, options: argparse.Namespace) -> Tensors:
    """By the names of the format if both sides have the same, else by native names, so that they can be compared."""
    if alike or kind not in _READERS:
        model = None
        if kind == "llama":
            with contextlib.suppress(CheckpointError):
                model = _model(place, kind, None)
        return read_any(place, _split(model)).tensors
    source = read(_READERS[kind], place, Options(config=options.config))
    if source.native.problems:
        raise CheckpointError(f"{place} cannot be compared: {'; '.join(source.native.problems)}.")
    return source.native.mapped.tensors


def verify(options: argparse.Namespace, progress: ProgressLine) -> int:
    """Whether a folder or file is whole."""
    place = place_of(options.path)
    problems, looked_at = verify_place(place, progress)
    for problem in problems:
        print(f"{place}: {problem}", file=sys.stderr)
    print(f"{'damaged' if problems else 'whole'}: {place} ({looked_at})")
    return 1 if problems else 0
