"""Data parallelism by FSDP2: sharded (FSDP), sharded and replicated (HSDP), or replicated only (DDP).

DDP is HSDP with one shard a replica, so all three cast, accumulate and reduce in the same way. Gradients are
*summed* over ranks: the loss is divided by the global number of tokens before the backward pass.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from titan_core.compat import fsdp_axes, fsdp_placement
from titan_core.config import ParallelConfig
from titan_core.mesh import Meshes
from titan_core.micro_batches import MicroBatchLoop
from titan_core.roles import ROLES, enclosing
from titan_core.routers import Routers
from titan_core.shards import local, unsharded_size


def shard(
    model: nn.Module,
    roles: Mapping[str, str],
    meshes: Meshes,
    config: ParallelConfig,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
) -> list[FSDPModule]:
    """Shards the parameters of `model`, or of a pipeline stage, over the fsdp axis, and replicates them over
    dp_replicate.

    Each unit of the roles table (a block, the embedding) is gathered on its own; what lies outside of the units
    (the last norm and the head) is one more. The experts of a block are gathered with it, although other ranks may hold
    their parts. `roles` are those of the modules that `model` has. Returns everything that FSDP wrapped.
    """
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=param_dtype,
            reduce_dtype=reduce_dtype,
            # Casting inputs would round what a model computes in float32 on purpose, such as rotary tables.
            cast_forward_inputs=False,
        )
    }
    if config.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    reshard = _reshard_after_forward(config)
    mesh = _with_replicas(meshes.dense, "fsdp")
    if meshes.experts is not None and (meshes.experts["ep"].size() > 1 or meshes.dense["tp"].size() > 1):
        options["shard_placement_fn"] = _place_experts(model, roles, meshes.experts)
    *units, root = shard_units(model, roles)
    for unit in units:
        # The backward begins with what the forward ended with, so freeing that would gather it twice.
        ends = config.reshard_after_forward == "default" and isinstance(unit, list) and unit is units[-1]
        fully_shard(unit, mesh=mesh, reshard_after_forward=False if ends else reshard, **options)
    fully_shard(root, mesh=mesh, reshard_after_forward=reshard, **options)
    wrapped: list[FSDPModule] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in wrapped:
        # The default averages, which gloo and a global token count both forbid.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    _prefetch(model, roles)
    return wrapped


def _with_replicas(mesh: DeviceMesh, axis: str) -> DeviceMesh:
    return mesh["dp_replicate", axis] if mesh["dp_replicate"].size() > 1 else mesh[axis]


def _reshard_after_forward(config: ParallelConfig) -> bool | int:
    policy = config.reshard_after_forward
    if policy == "default":
        return config.pp == 1  # a pipeline would gather anew for every micro-batch
    return policy == "always" if isinstance(policy, str) else policy


def _place_experts(model: nn.Module, roles: Mapping[str, str], mesh: DeviceMesh) -> Callable[[nn.Parameter], Any]:
    """For each parameter how FSDP cuts it: those of experts over their own axis."""
    ranks = mesh["expert_fsdp"].size()
    modules = [model.get_submodule(fqn) for fqn, role in roles.items() if ROLES[role].expert]
    experts = {parameter for module in modules for parameter in module.parameters()}
    axes = fsdp_axes(_with_replicas(mesh, "expert_fsdp"))

    def placement(parameter: nn.Parameter) -> Any:
        if parameter not in experts:
            return None
        # With fewer experts than ranks, some ranks would hold nothing.
        few = local(parameter).shape[0] < ranks and local(parameter).shape[1] % ranks == 0
        return fsdp_placement(Shard(1 if few else 0), axes)

    return placement


def _prefetch(model: nn.Module, roles: Mapping[str, str]) -> None:
    """Lets a block with experts gather the next one early: dispatching tokens makes the host wait, and FSDP with it."""
    dispatching = {enclosing(fqn, roles, "block") for fqn, role in roles.items() if ROLES[role].expert}
    names = [fqn for fqn, role in roles.items() if role == "block"]
    blocks = [cast(FSDPModule, model.get_submodule(fqn)) for fqn in names]
    for i, name in enumerate(names):
        if name in dispatching:
            blocks[i].set_modules_to_forward_prefetch(blocks[i + 1 : i + 2])
            blocks[i].set_modules_to_backward_prefetch(blocks[max(i - 1, 0) : i])


class DataParallel(MicroBatchLoop):
    """Runs micro-batches of a model that `shard` has wrapped, and reduces gradients when `grad_sync` says so."""

    def __init__(
        self,
        model: nn.Module,
        size: int,
        routers: Routers,
        wrapped: list[FSDPModule],
        meshes: Meshes,
        *,
        grad_sync: str,
        itemsize: int,
    ) -> None:
        super().__init__(model, size, routers)
        self._wrapped = wrapped
        self._itemsize = itemsize
        self._reduce_shards_last = grad_sync == "last" or (grad_sync == "auto" and meshes.dense["fsdp"].size() == 1)
        self._reduce_replicas_last = grad_sync != "every"

    def begin_step(self) -> None:
        """FSDP casts when it gathers; nothing is left to do at the start of a step."""

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Within it, a backward reduces gradients if this is the step's `last` micro-batch or `grad_sync` says so."""
        for module in self._wrapped:
            module.set_requires_gradient_sync(last or not self._reduce_shards_last, recurse=False)
            module.set_requires_all_reduce(last or not self._reduce_replicas_last, recurse=False)
            module.set_is_last_backward(last)
        yield

    def end_evaluation(self) -> None:
        """Drops what a forward without a backward has left gathered."""
        for module in self._wrapped:
            module.reshard()

    def gradient_bytes(self) -> int:
        """Bytes that gradients take on this rank while micro-batches accumulate, beyond the sharded ones."""
        return whole_gradient_bytes(self.model, self._itemsize) if self._reduce_shards_last else 0


def whole_gradient_bytes(model: nn.Module, itemsize: int) -> int:
    """Bytes of the gradients of `model` on this rank before they are reduced over the fsdp axis."""
    return sum(unsharded_size(p, "fsdp", "expert_fsdp", "dp_replicate") for p in model.parameters()) * itemsize


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
