"""torch.compile, block by block: equal blocks share one compiled region, and nothing around them is traced."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from titan_core.config import CompileConfig, RematConfig
from titan_core.surgery import specialise


class CompileError(ValueError):
    """The compiler asked for does not exist."""


def compile_blocks(model: nn.Module, roles: Mapping[str, str], config: CompileConfig, remat: RematConfig) -> None:
    """Compiles the forward of each block of `model`; call it after what changes the blocks and before FSDP wraps
    them.
    """
    if not config.enabled:
        return
    check_backend(config)
    if remat.mode == "budget":
        # Read when a region is compiled, which is at its first call and again when shapes change.
        from titan_core.compat import set_activation_budget

        set_activation_budget(remat.budget)

    def members(base: type[nn.Module]) -> dict[str, Any]:
        return {"forward": torch.compile(base.forward, backend=config.backend, fullgraph=config.fullgraph)}

    for fqn, role in roles.items():
        if role == "block":
            specialise(model.get_submodule(fqn), ("compile", config), members)


def check_backend(config: CompileConfig) -> None:
    """Raises CompileError if this torch has no such compiler; which it has depends on what is installed."""
    known = torch.compiler.list_backends(exclude_tags=())
    if config.enabled and isinstance(config.backend, str) and config.backend not in known:
        useful = [name for name in known if not name.endswith("TESTING_ONLY")]
        raise CompileError(
            f"compile.backend {config.backend!r} is unknown to this torch; use one of {', '.join(useful)}."
        )
