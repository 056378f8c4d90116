"""Fills a laid-out model with the weights of an `Origin`: each rank reads the rows it owns, a few at a time."""

import importlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from titan_ckpt.checkpoint import open_checkpoint
from titan_ckpt.contents import FILES_FOLDER
from titan_ckpt.conversion.keymap import ModelFacts
from titan_ckpt.conversion.survey import verify
from titan_ckpt.conversion.translate import Native, from_dcp, from_hugging_face
from titan_ckpt.errors import CheckpointError, DamagedCheckpointError
from titan_ckpt.formats.lazy import LazyTensor
from titan_ckpt.place import Place
from titan_ckpt.world import RanksFailedError, World
from titan_core.shards import local, owned
from titan_models.config import DecoderConfig
from titan_models.facts import shared_names, state_shapes
from titan_quant.config import LoRAConfig
from titan_train.adapters import merged
from titan_train.config_file import RUN_CONFIG
from titan_train.origin import Origin

_SHOWN = 8  # problems; the rest are counted


def load_weights(model: nn.Module, origin: Origin, *, verify_hashes: bool = True) -> None:
    """Reads the parameters, and the buffers that are there too; called by all ranks.

    Args:
        model: on whatever layout; a pipeline's part has some of the parameters.
        origin: of the same model.
        verify_hashes: compare the SHA-256 of a checkpoint's files first, to which ranks read a share each.

    Raises:
        CheckpointError: if files are damaged, or names or shapes do not fit; all are listed, and nothing has changed.
    """
    if origin.is_checkpoint:
        open_checkpoint(origin.place, verify_hashes=verify_hashes)
    elif verify_hashes:
        _verify_folder(origin.place)
    weights = _native(origin)
    if problems := weights.problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(f"The weights in {origin.place} do not fit: {'; '.join(problems[:_SHOWN])}{more}.")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in weights.mapped.tensors:
            _fill(tensor, weights.mapped.tensors[name])


def _verify_folder(place: Place) -> None:
    """Compares a folder of somebody else's format with the hashes that it came with, if it did."""
    try:
        problems, _ = World().first(lambda: verify(place))
    except RanksFailedError as error:
        raise CheckpointError(f"{place} could not be verified: {error}") from error
    if problems:
        raise DamagedCheckpointError(place, problems)


def facts_of(config: DecoderConfig) -> ModelFacts:
    """What a conversion has to know of a model."""
    return ModelFacts(shapes=state_shapes(config), shared=shared_names(config), head_dim=config.head_dim)


def hugging_face_keys(config: DecoderConfig) -> Mapping[str, str | tuple[str, ...]]:
    """The names that Hugging Face gives the weights of the model's family."""
    return importlib.import_module(type(config).__module__).KEYS["hf"]


def _native(origin: Origin) -> Native:
    facts = facts_of(origin.model)
    if origin.is_checkpoint:
        lora = _lora_of(origin.place)
        return from_dcp(origin.place, None, facts, rewrite=lambda tensors: merged(tensors, lora) if lora else tensors)
    derived = importlib.import_module(type(origin.model).__module__).DERIVED
    return from_hugging_face(origin.place, hugging_face_keys(origin.model), facts, derived)


def _lora_of(checkpoint: Place) -> LoRAConfig | None:
    """What the adapters in a checkpoint of a run were made with; None if it has none."""
    name = f"{FILES_FOLDER}/{RUN_CONFIG}"
    if name not in checkpoint.files():
        return None
    lora = json.loads(checkpoint.read(name)).get("lora", {})
    return LoRAConfig(rank=lora["rank"], alpha=lora["alpha"]) if lora.get("rank") else None


@torch.no_grad()
def _fill(tensor: Tensor, weights: LazyTensor) -> None:
    part, target = owned(tensor), local(tensor)
    if not part:
        target.copy_(weights.all())
        return
    rows = part[0]
    for start, stop in weights.pieces():
        first, last = max(start, rows.start), min(stop, rows.stop)
        if first < last:
            target[first - rows.start : last - rows.start].copy_(weights.read(first, last)[(slice(None), *part[1:])])
