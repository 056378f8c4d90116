"""Which model a folder holds: its configuration, and the facts and key maps that the conversion engine asks for.

Imports torch only where a folder's tensors have to be looked at.
"""

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from titan_ckpt.errors import CheckpointError
from titan_ckpt.location import place_of
from titan_ckpt.place import Place
from titan_models import hugging_face, meta, model_file
from titan_models.config import DecoderConfig
from titan_models.facts import shared_names, state_shapes
from titan_models.shape import ModelConfigError

if TYPE_CHECKING:
    from titan_ckpt.conversion.keymap import KeyMap, ModelFacts

UNDER: Mapping[str, str | None] = {"titan": "model", "torchtune": "model", "torchtitan": None, "torchtitan-0.2": None}
"""Who writes a DCP folder -> the object in it that is the model."""

_CARRIED = f"files/{model_file.MODEL_FILE}"


@dataclass(frozen=True)
class Model:
    """A configuration, and what the conversion engine asks of it."""

    config: DecoderConfig

    unsaid: tuple[str, ...] = ()
    """Fields of it that the format which it was read from has no place for."""

    @property
    def family(self) -> str:
        """The module that defines the family."""
        return type(self.config).__module__

    @property
    def facts(self) -> "ModelFacts":
        """Names, shapes and heads."""
        from titan_ckpt.conversion.keymap import ModelFacts

        return ModelFacts(
            shapes=state_shapes(self.config), shared=shared_names(self.config), head_dim=self.config.head_dim
        )

    def keys(self, names: str) -> "KeyMap | None":
        """The key map to a naming of DCP folders; None for our own."""
        return None if names == "titan" else self.table(names)

    def table(self, names: str) -> "KeyMap":
        """The key map to somebody else's naming.

        Raises:
            CheckpointError: if the family has no such names.
        """
        known = importlib.import_module(self.family).KEYS
        if names not in known:
            raise CheckpointError(f"{self.family} has no names of {names!r}; it has {', '.join(known)}.")
        return known[names]

    @property
    def derived(self) -> Sequence[str]:
        """Foreign names to pass over."""
        return importlib.import_module(self.family).DERIVED

    def differences(self, other: "Model") -> list[str]:
        """The fields in which another configuration differs, of those that both come from formats for."""
        return model_file.differences(self.config, other.config, (*self.unsaid, *other.unsaid))


def of_hugging_face(place: Place) -> Model:
    """The model of a folder with a `config.json`."""
    config = _translated(place, lambda: hugging_face.from_hugging_face(_json(place, hugging_face.CONFIG_FILE)))
    return Model(config, hugging_face.UNSAID)


def of_meta(place: Place) -> Model:
    """The model of a folder with a `params.json`, of which the weights tell the vocabulary and whether it is tied."""
    from titan_ckpt.conversion.keymap import same
    from titan_ckpt.formats.meta import read_meta

    params = _json(place, meta.PARAMS_FILE)
    tensors = read_meta(place, {"tok_embeddings.weight": 0, "output.weight": 0}).tensors
    embedding, head = tensors.get("tok_embeddings.weight"), tensors.get("output.weight")
    if embedding is None:
        raise CheckpointError(f"{place} holds no tok_embeddings.weight; it is no model of Meta's Llama format.")
    tied = head is None or same(embedding, head)
    config = _translated(place, lambda: meta.from_meta(params, vocab_size=embedding.shape[0], tied=tied))
    return Model(config, meta.UNSAID)


def of_checkpoint(place: Place, config: str | None) -> Model:
    """The model of a DCP folder: by `files/model.json`, else by the file or folder that the user names.

    Raises:
        CheckpointError: if neither says it, or the two differ, listing the fields.
    """
    named = None if config is None else _named(config)
    if says_its_model(place):
        own = Model(_translated(place, lambda: model_file.from_json(place.read(_CARRIED))))
        if named is not None and (differing := own.differences(named)):
            raise CheckpointError(
                f"{place} says in {_CARRIED} which model it holds, and --config {config} describes another one: "
                f"{'; '.join(differing)}. Leave out --config."
            )
        return own
    if named is None:
        raise CheckpointError(
            f"{place} doesn't say which model it holds: it has no {_CARRIED}. Name it with --config: a model.json, a "
            "config.json of Hugging Face, a params.json of Meta, or a folder with one of them."
        )
    return named


def says_its_model(place: Place) -> bool:
    """Whether a DCP folder carries a configuration."""
    return _CARRIED in place.files()


def _named(config: str) -> Model:
    place = place_of(config)
    names = place.files() if place.path is None or place.path.is_dir() else {place.name: 0}
    folder = place if place.name not in names else place.parent
    if model_file.MODEL_FILE in names:
        return Model(_translated(folder, lambda: model_file.from_json(folder.read(model_file.MODEL_FILE))))
    if _CARRIED in names:
        return of_checkpoint(folder, None)
    if hugging_face.CONFIG_FILE in names:
        return of_hugging_face(folder)
    if meta.PARAMS_FILE in names:
        return of_meta(folder)
    raise CheckpointError(
        f"--config {config} is neither a model.json, config.json or params.json nor a folder with one."
    )


def _translated(place: Place, translate: Any) -> DecoderConfig:
    try:
        return translate()
    except ModelConfigError as error:
        raise CheckpointError(f"{place}: {error}") from error


def _json(place: Place, name: str) -> dict[str, Any]:
    try:
        values = json.loads(place.read(name))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{place} has no {name}, without which nobody can tell what its weights compute."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{place}/{name} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{place}/{name} holds no JSON object.")
    return values
