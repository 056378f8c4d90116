"""Activation recomputation: what a block computed in forward is computed again in backward instead of being kept.

Source of the idea: arXiv 1604.06174. Random numbers are functions of (seed, step, name, index) here, so no generator's
state has to be kept for the second run.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titan_core.config import RematConfig
from titan_core.surgery import specialise

# Operators whose results are costly to compute and cheap to keep. Of collectives those that reduce or exchange belong
# to them: computing their results again would communicate again. Those that gather do not, nor does the ring of context
# parallelism: they communicate again, since what they give is whole sequences, of which a rank else keeps its part.
_COSTLY = (
    "aten.mm.default",
    "aten.addmm.default",
    "aten.bmm.default",
    "aten._grouped_mm.default",
    "aten._scaled_mm.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "_c10d_functional.all_reduce.default",
    "_c10d_functional.reduce_scatter_tensor.default",
    "_c10d_functional.all_to_all_single.default",
)


class RematError(ValueError):
    """The operators to keep are unknown; the message names them."""


def apply_remat(model: nn.Module, roles: Mapping[str, str], config: RematConfig, costly: Sequence[str] = ()) -> None:
    """Lets the blocks of `model` recompute their activations as `config` says.

    `costly`: the model's own operators, `namespace.name.overload`, whose results `selective` keeps besides torch's.

    Raises:
        RematError: if an operator does not exist.
    """
    if config.mode in ("none", "budget"):
        return
    names = config.save_ops or (*_COSTLY, *costly)
    contexts = _selective_contexts(names) if config.mode == "selective" else None
    blocks = [fqn for fqn, role in roles.items() if role == "block"]
    for block in blocks[:: config.every]:
        _recompute(model.get_submodule(block), config, names, contexts)


def _recompute(
    block: nn.Module, config: RematConfig, names: tuple[str, ...], contexts: Callable[[], Any] | None
) -> None:
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if contexts is not None:
        options["context_fn"] = contexts

    def members(base: type[nn.Module]) -> dict[str, Any]:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            return checkpoint(base.forward, self, *args, **options, **kwargs)

        return {"forward": forward}

    specialise(block, ("remat", config, names), members)


def _selective_contexts(names: tuple[str, ...]) -> Callable[[], Any]:
    kept = {_operator(name) for name in names}

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


def _operator(name: str) -> Any:
    parts = name.split(".")
    operator: Any = torch.ops
    for part in parts if len(parts) == 3 else (*parts, "default"):
        try:
            operator = getattr(operator, part)
        except AttributeError:
            raise RematError(
                f"remat.save_ops names the operator {name!r}, which this torch does not have; write it as "
                "namespace.name.overload, such as aten.mm.default."
            ) from None
    return operator
