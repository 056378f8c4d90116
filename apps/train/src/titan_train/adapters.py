"""LoRA adapters in a checkpoint: read by themselves, or added to the weights that they correct."""

from collections.abc import Mapping

import torch
from torch import Tensor

from titan_ckpt.conversion.translate import MODEL
from titan_ckpt.formats.dcp_folder import read_dcp
from titan_ckpt.formats.lazy import LazyTensor
from titan_ckpt.place import Place
from titan_quant.config import LoRAConfig

_A, _B = ".lora_a", ".lora_b"


def adapter_tensors(checkpoint: Place) -> dict[str, Tensor]:
    """`<layer>.lora_a` [rank, K] and `<layer>.lora_b` [N, rank] of every layer that has them, in memory."""
    tensors = read_dcp(checkpoint).tensors
    start = f"{MODEL}."
    return {name.removeprefix(start): tensors[name].all() for name in tensors if name.endswith((_A, _B))}


def merged(tensors: Mapping[str, LazyTensor], config: LoRAConfig) -> dict[str, LazyTensor]:
    """A model's tensors without adapters, each of which is added to its weight when that is read.

    The correction is computed in float32 and rounded once, to its weight's dtype.
    """
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith((_A, _B))}
    for layer in (name.removesuffix(_A) for name in tensors if name.endswith(_A)):
        name = f"{layer}.weight"
        found[name] = _corrected(tensors[name], tensors[layer + _A], tensors[layer + _B], config.scale)
    return found


def _corrected(weight: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float) -> LazyTensor:
    def read(start: int, stop: int) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        correction = b.read(start, stop).to(wide) @ a.all().to(wide)
        return (weight.read(start, stop).to(wide) + scale * correction).to(weight.dtype)

    return LazyTensor(weight.dtype, weight.shape, (*weight.files, *a.files, *b.files), read)
