"""LoRA: a linear layer keeps its weight and learns a correction of low rank (arXiv 2106.09685, section 4.1).

    output = weight x + alpha / rank * lora_b (lora_a x)

The two matrices are parameters of the layer itself, `<layer>.lora_a` [rank, K] and `<layer>.lora_b` [N, rank], so that
no name changes and whatever the layer already does, computing in float8 say, it goes on doing; they themselves are
computed in the layer's own dtype. Call `add_lora` on the whole model, after `quantize` and before it is laid out.
There is no dropout: its draws would have to be the same on every layout.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_quant.config import LoRAConfig
from titan_quant.select import SelectionError, select_linears

_CLASSES: dict[type[nn.Linear], type[nn.Linear]] = {}


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """What `add_lora` did to a model, and what others must know of it."""

    layers: tuple[str, ...]
    """FQNs of the layers that have adapters."""
    init: Mapping[str, tuple[str, float]]
    """FQN of each added parameter -> ("normal", standard deviation) or ("constant", value)."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """FQNs of the added parameters: all that is trained, and all that a checkpoint of the base model lacks."""
        return tuple(self.init)


# How tensor parallelism cuts what is added, by the role of the layer: along which dimension; None: every rank has it
# whole, reads it through a function whose backward sums its gradient over the ranks, and applies it to its own part.
TENSOR_PARALLEL: Mapping[str, Mapping[str, int | None]] = {
    "colwise": {"lora_a": None, "lora_b": 0},
    "rowwise": {"lora_a": 1, "lora_b": None},
}


def add_lora(model: nn.Module, config: LoRAConfig, roles: Mapping[str, str] | None = None) -> Adapters:
    """Freezes `model` and gives the layers that `config` names adapters, which are all that is trained from then on.

    Layers not on the meta device get adapters that change nothing yet, drawn by torch's own generator; for a model on
    the meta device the rules for it are returned.

    Args:
        model: any module; its linear layers are `nn.Linear`, converted by `titan_quant.convert.quantize` or not.
        config: which layers, and the rank.
        roles: FQN -> role; without them every linear layer but the head gets adapters.

    Raises:
        ValueError: if `config` has problems; all are listed.
        SelectionError: if a name in `config` fits nothing, or no layer is left.
    """
    if problems := config.problems():
        raise ValueError("This model cannot be given adapters. " + " ".join(problems))
    if config.rank == 0:
        return Adapters(layers=(), init={})
    chosen, skipped = select_linears(
        model, roles, wanted=config.roles, include=config.include, exclude=config.exclude, option="lora"
    )
    if not chosen:
        reasons = ", ".join(sorted(set(skipped.values()))) or "it has no linear layers"
        raise SelectionError(
            f"No layer of this model gets an adapter ({reasons}). Name layers in lora.roles or lora.include."
        )
    model.requires_grad_(False)
    init: dict[str, tuple[str, float]] = {}
    for fqn, module in chosen.items():
        # The variance of torch's own linear layers, which PEFT gives its adapters too.
        std = 1 / math.sqrt(3 * module.in_features)
        _adapt(module, config, std)
        init |= {f"{fqn}.lora_a": ("normal", std), f"{fqn}.lora_b": ("constant", 0.0)}
    return Adapters(layers=tuple(chosen), init=init)


def _adapt(module: Any, config: LoRAConfig, std: float) -> None:
    weight = module.weight
    module.lora_a = nn.Parameter(weight.new_empty(config.rank, weight.shape[1]))
    module.lora_b = nn.Parameter(weight.new_zeros(weight.shape[0], config.rank))
    nn.init.normal_(module.lora_a, std=std)
    module.lora_scale = config.scale
    base = type(module)
    if base not in _CLASSES:
        _CLASSES[base] = _with_adapter(base)
    module.__class__ = _CLASSES[base]


def _with_adapter(base: type[nn.Linear]) -> type[nn.Linear]:
    def forward(self: Any, input: Tensor) -> Tensor:
        down = F.linear(input, self.lora_a)
        return base.forward(self, input) + F.linear(down, self.lora_b) * self.lora_scale

    members = {"forward": forward, "__module__": base.__module__, "__doc__": f"{base.__name__} with a LoRA adapter."}
    return type(base.__name__, (base,), members)


@torch.no_grad()
def merge_lora(state: Mapping[str, Tensor], config: LoRAConfig) -> dict[str, Tensor]:
    """The state dict `state` of a model with adapters as that of one without: each is added to its weight.

    Tensors may be DTensors. A correction is computed in float32 and rounded once, to its weight's dtype.
    """
    merged = {name: tensor for name, tensor in state.items() if not name.endswith((".lora_a", ".lora_b"))}
    for name in state:
        if not name.endswith(".lora_a"):
            continue
        layer = name.removesuffix(".lora_a")
        weight, a, b = state[f"{layer}.weight"], state[name], state[f"{layer}.lora_b"]
        merged[f"{layer}.weight"] = (weight.float() + config.scale * (b.float() @ a.float())).to(weight.dtype)
    return merged
