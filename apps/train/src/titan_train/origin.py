"""Where a new run's weights come from: what `--checkpoint.init-from` names, and the model that it says they are of.

The model's configuration travels with its weights, so that a run which starts from them needs no preset and cannot
disagree with them. Imports no torch.
"""

import json
from dataclasses import dataclass

from titan_ckpt.directory import candidates, step_of
from titan_ckpt.errors import CheckpointError
from titan_ckpt.manifest import MANIFEST_NAME, Manifest
from titan_ckpt.place import Place, place_of
from titan_data.config import DataConfig
from titan_models import hugging_face, model_file
from titan_models.config import DecoderConfig, ModelConfigError
from titan_train.config import TrainConfig
from titan_train.parts import differences

_TOKENIZER = "tokenizer.json"
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
    """The local path of the tokenizer that goes with them, if there is one."""


def find_origin(location: str) -> Origin:
    """Looks up what a path or URL names: a run's directory, a checkpoint, or a Hugging Face folder.

    Raises:
        OriginError: if it is none of them, or does not say which model its weights are of.
    """
    place = place_of(location)
    try:
        return _origin(place)
    except (CheckpointError, ModelConfigError, OSError) as error:
        raise OriginError(f"--checkpoint.init-from {location}: {error}") from error


def _origin(place: Place) -> Origin:
    names = place.files()
    if not names:
        raise OriginError(f"--checkpoint.init-from {place}: there is nothing.")
    if MANIFEST_NAME in names:
        return _of_checkpoint(place)
    if hugging_face.CONFIG_FILE in names and any("/" not in name and name.endswith(".safetensors") for name in names):
        config = hugging_face.from_hugging_face(json.loads(place.read(hugging_face.CONFIG_FILE)))
        return Origin(place=place, model=config, is_checkpoint=False, tokenizer=_tokenizer(place, names))
    for directory in (place / "checkpoints", place):
        for folder in candidates(directory):
            if _looks_whole(folder):
                return _of_checkpoint(folder)
    raise OriginError(
        f"--checkpoint.init-from {place}: this is neither a run's directory with a whole checkpoint, nor a checkpoint, "
        "nor a Hugging Face folder (config.json and safetensors files). Other formats are converted first, by "
        "titan-convert; `titan-convert inspect` says what a folder is."
    )


def _of_checkpoint(place: Place) -> Origin:
    files = place / "files"
    names = files.files()
    if model_file.MODEL_FILE not in names:
        raise OriginError(
            f"--checkpoint.init-from {place}: it does not say which model its weights are of (no "
            f"files/{model_file.MODEL_FILE}). Convert it with titan-convert, which writes one."
        )
    model = model_file.from_json(files.read(model_file.MODEL_FILE))
    return Origin(place=place, model=model, is_checkpoint=True, tokenizer=_tokenizer(files, names))


def _tokenizer(place: Place, names: dict[str, int]) -> str | None:
    return str(place.path / _TOKENIZER) if _TOKENIZER in names and place.path is not None else None


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
            f"{origin.place} has no tokenizer.json on this disk, and a tokenizer trained on your text would give the "
            "weights other tokens than they have learned; name theirs with --data.tokenizer."
        )
