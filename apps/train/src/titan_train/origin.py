"""Where a new run's weights come from: what `--checkpoint.init-from` names, and the model that it says they are of.

The model's configuration travels with its weights, so that a run which starts from them needs no preset and cannot
disagree with them. Imports no torch.
"""

import hashlib
import json
import os
from dataclasses import dataclass

from titan_ckpt.directory import step_of
from titan_ckpt.errors import CheckpointError
from titan_ckpt.location import place_of
from titan_ckpt.manifest import MANIFEST_NAME, Manifest
from titan_ckpt.open_directory import candidates
from titan_ckpt.place import Place
from titan_data.cache import cache_directory
from titan_data.config import DataConfig
from titan_models import hugging_face, model_file
from titan_models.config import DecoderConfig
from titan_models.shape import ModelConfigError
from titan_train.config import TrainConfig
from titan_train.parts import differences

# What a tokenizer is loaded from, the first that is there, and what may stand beside it.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# Fields that say how a model is trained further, not what its weights compute.
_FREE = ("init_std", "moe.balance_loss", "moe.z_loss", "moe.bias_update_rate")


class OriginError(ValueError):
    """What is named holds no weights that a run can start from, or they are of another model."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Weights, and the model they are of."""

    place: Place
    """A checkpoint with a manifest, or a Hugging Face folder."""
    model: DecoderConfig
    """As it is written beside them."""
    is_checkpoint: bool
    """Which of the two."""
    tokenizer: str | None
    """The path, on this machine, of the tokenizer that goes with them, if there is one."""


def find_origin(location: str, *, option: str = "--checkpoint.init-from ") -> Origin:
    """Looks up what a path or URL names: a run's directory, a checkpoint, or a Hugging Face folder.

    `option` is what the message begins with, before the location.

    Raises:
        OriginError: if it is none of them, or does not say which model its weights are of.
    """
    try:
        return _origin(place_of(location))
    except (OriginError, CheckpointError, ModelConfigError, OSError) as error:
        raise OriginError(f"{option}{location}: {error}") from error


def _origin(place: Place) -> Origin:
    if place.path is not None and place.path.is_file():
        raise OriginError("this is a file; name the folder that it is in.")
    names = place.files()
    if not names:
        raise OriginError("there is nothing; name the folder or URL of a run, a checkpoint or a Hugging Face model.")
    if MANIFEST_NAME in names:
        return _of_checkpoint(place)
    if hugging_face.CONFIG_FILE in names and any("/" not in name and name.endswith(".safetensors") for name in names):
        try:
            values = json.loads(place.read(hugging_face.CONFIG_FILE))
        except ValueError as error:
            raise OriginError(f"{place}/{hugging_face.CONFIG_FILE} is not JSON: {error}.") from error
        config = hugging_face.from_hugging_face(values)
        return Origin(place=place, model=config, is_checkpoint=False, tokenizer=tokenizer_in(place))
    for directory in (place / "checkpoints", place):
        for folder in candidates(directory):
            if _looks_whole(folder):
                return _of_checkpoint(folder)
    raise OriginError(
        "this is neither a run's directory with a whole checkpoint, nor a checkpoint, "
        "nor a Hugging Face folder (config.json and safetensors files). Other formats are converted first, by "
        "titan-convert; `titan-convert inspect` says what a folder is."
    )


def _of_checkpoint(place: Place) -> Origin:
    files = place / "files"
    names = files.files()
    if model_file.MODEL_FILE not in names:
        raise OriginError(
            f"{place} does not say which model its weights are of (no files/{model_file.MODEL_FILE}). Convert it with "
            "titan-convert, which writes one."
        )
    model = model_file.from_json(files.read(model_file.MODEL_FILE))
    return Origin(place=place, model=model, is_checkpoint=True, tokenizer=tokenizer_in(files))


def tokenizer_in(place: Place) -> str | None:
    """The path of the tokenizer in a folder, fetched into the cache first if it is elsewhere; None if it has none."""
    names = place.files()
    name = next((name for name in _TOKENIZERS if name in names), None)
    if name is None:
        return None
    if place.path is not None:
        return str(place.path / name)
    contents = {each: place.read(each) for each in (name, *_COMPANIONS) if each in names}
    digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents.values())).hexdigest()
    folder = cache_directory(None) / "fetched" / digest[:32]
    folder.mkdir(parents=True, exist_ok=True)
    for each, content in contents.items():
        # Under a name of this process first: other ranks fetch the same.
        temporary = folder / f"{each}.{os.getpid()}"
        temporary.write_bytes(content)
        temporary.replace(folder / each)
    return str(folder / name)


def _looks_whole(folder: Place) -> bool:
    try:
        return step_of(folder.name) is not None and not Manifest.read(folder).damage(folder, hashes=False)
    except CheckpointError:
        return False


def check_origin(config: TrainConfig, origin: Origin) -> None:
    """Raises OriginError if a run would take the weights for those of another model, or give them other tokens."""
    there, here = (json.loads(model_file.to_json(model)) for model in (origin.model, config.model))
    changes = [line for line in differences(there, here) if not line.startswith(_FREE)]
    if changes:
        listed = "".join(f"\n  model.{change}" for change in changes)
        raise OriginError(
            f"The weights in {origin.place} are of another model. From theirs to what you ask for, this "
            f"changes:{listed}\nLeave out --config and --model.*: the model is then taken from beside the weights."
        )
    if config.data.tokenizer == DataConfig.tokenizer:
        raise OriginError(
            f"A tokenizer trained on your text (data.tokenizer {DataConfig.tokenizer}) would give the weights in "
            f"{origin.place} other tokens than they have learned"
            f"{'' if origin.tokenizer else ', and there is none beside them'}; name theirs with --data.tokenizer."
        )
