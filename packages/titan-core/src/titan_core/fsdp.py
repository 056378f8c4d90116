"""Data parallelism by FSDP2: sharded (FSDP), sharded and replicated (HSDP), or replicated only (DDP).

DDP is HSDP with one shard a replica, so all three cast, accumulate and reduce in the same way. Gradients are
*summed* over ranks: the loss is divided by the global number of tokens before the backward pass.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from titan_core.mesh import DATA_AXES
from titan_core.roles import ROLES

GradSync = Literal["auto", "last", "every"]


class DataParallel:
    """Runs micro-batches of `model` with its parameters sharded and replicated over the mesh's data axes.

    Each unit of the roles table (a block, the embedding) is gathered on its own; what lies outside of the units
    (the last norm and the head) is one more.
    """

    def __init__(
        self,
        model: nn.Module,
        roles: Mapping[str, str],
        mesh: DeviceMesh,
        *,
        param_dtype: torch.dtype,
        reduce_dtype: torch.dtype,
        grad_sync: GradSync,
        reshard_after_forward: bool,
    ) -> None:
        replicas, shards = (mesh[axis].size() for axis in DATA_AXES)
        policy = MixedPrecisionPolicy(
            param_dtype=param_dtype,
            reduce_dtype=reduce_dtype,
            # Casting inputs would round what a model computes in float32 on purpose, such as rotary tables.
            cast_forward_inputs=False,
        )
        data_mesh = mesh[DATA_AXES] if replicas > 1 else mesh["dp_shard"]
        for unit in shard_units(model, roles):
            fully_shard(unit, mesh=data_mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in self._modules:
            # The default averages, which gloo and a global token count both forbid.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        self._model = model
        self._reduce_dtype = reduce_dtype
        self._reduce_shards_last = grad_sync == "last" or (grad_sync == "auto" and shards == 1)
        self._reduce_replicas_last = grad_sync != "every"

    def begin_step(self) -> None:
        """FSDP casts when it gathers; nothing is left to do at the start of a step."""

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Within it, a backward reduces gradients if this is the step's `last` micro-batch or `grad_sync` says so."""
        for module in self._modules:
            module.set_requires_gradient_sync(last or not self._reduce_shards_last, recurse=False)
            module.set_requires_all_reduce(last or not self._reduce_replicas_last, recurse=False)
            module.set_is_last_backward(last)
        yield

    def gradient_bytes(self) -> int:
        """Bytes that gradients take on this rank while micro-batches accumulate, beyond the sharded ones."""
        if not self._reduce_shards_last:
            return 0
        return sum(p.numel() for p in self._model.parameters()) * self._reduce_dtype.itemsize


def shard_units(model: nn.Module, roles: Mapping[str, str]) -> list[nn.Module | list[nn.Module]]:
    """What FSDP gathers together, innermost first: modules, or lists of modules; the whole model comes last.

    Modules that share a parameter are put into one unit.
    """
    units = [fqn for fqn, role in roles.items() if ROLES[role].unit]
    blocks = [fqn for fqn in units if roles[fqn] == "block"]
    rest = [
        fqn
        for fqn in roles
        if fqn not in units
        and not any(fqn.startswith(f"{unit}.") for unit in units)
        and next(model.get_submodule(fqn).parameters(recurse=False), None) is not None
    ]
    groups = [[fqn] for fqn in units if fqn not in blocks] + ([rest] if rest else [])
    groups = _merge_sharing(model, groups)
    outer = [[model.get_submodule(fqn) for fqn in group] for group in groups]
    return [*(model.get_submodule(fqn) for fqn in blocks), *outer, model]


def _merge_sharing(model: nn.Module, groups: list[list[str]]) -> list[list[str]]:
    merged: list[list[str]] = []
    for group in groups:
        mine = {p for fqn in group for p in model.get_submodule(fqn).parameters()}
        for other in merged:
            if mine & {p for fqn in other for p in model.get_submodule(fqn).parameters()}:
                other.extend(group)
                break
        else:
            merged.append(list(group))
    return merged
