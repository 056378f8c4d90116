"""The order in which techniques are applied to a model: one screen."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from titan_core.compiling import compile_blocks
from titan_core.config import CompileConfig, ParallelConfig, RematConfig
from titan_core.mesh import Meshes
from titan_core.micro_batches import Batch
from titan_core.remat import apply_remat
from titan_core.roles import ROLES
from titan_core.routers import Routers
from titan_core.single import SingleDevice


class Layout(Protocol):
    """A model laid out on its ranks, ready to train."""

    model: nn.Module
    """What this rank holds of the model: all of it, or its pipeline stages. Its names are the model's."""
    routers: Routers
    """Its routers; call their `finish_step` after each step of the optimizer."""

    def accumulate(self, batch: Batch, *, divisor: float) -> Tensor:
        """Adds up gradients of the summed loss over this rank's `batch`, divided by `divisor`; returns that loss."""

    def gradient_bytes(self) -> int:
        """Bytes of whole gradients kept on this rank while micro-batches accumulate."""


def parallelize(
    model: nn.Module,
    roles: Mapping[str, str],
    meshes: Meshes | None,
    config: ParallelConfig,
    *,
    micro_batch_size: int,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    remat: RematConfig = RematConfig(),
    compiling: CompileConfig = CompileConfig(),
    costs: Mapping[str, float] | None = None,
    costly: Sequence[str] = (),
) -> Layout:
    """Lays out `model`, whose parameters may still be meta tensors; `roles` as `resolve_roles` returns them.

    Without meshes the model stays on one device. Parameters keep their dtype: it is what the optimizer works on;
    `param_dtype` is what forward and backward compute with, `reduce_dtype` what gradients are reduced in.
    `micro_batch_size` is in rows. `costs` (FQN -> any unit) balance the stages of a pipeline.
    `costly`: the model's own operators whose results selective recomputation keeps.
    """
    if meshes is None:
        _recompute_and_compile(model, roles, remat, compiling, costly)
        routers = Routers(model, roles)
        return SingleDevice(model, micro_batch_size, routers, param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    from titan_core.fsdp import DataParallel, shard

    degrees = meshes.degrees
    width = _hidden_width(model, roles)
    stages = None
    if degrees.pp > 1:
        from titan_core.pipeline import cut_into_stages

        stages = cut_into_stages(model, roles, config, meshes.data.get_local_rank("pp"), costs or {})
        model = stages.model
        roles = _present(model, roles)
    if degrees.tp > 1:
        from titan_core.tensor import TensorParallel, enable_async_tensor_parallel

        if config.async_tp:
            enable_async_tensor_parallel(degrees.tp)
        TensorParallel(meshes.dense["tp"], sequence_parallel=config.sequence_parallel).apply(model, roles)
    if degrees.cp > 1:
        from titan_core.sequence import apply_context_parallel

        apply_context_parallel(model, roles, meshes.group("cp"), config)
    if degrees.ep > 1 and meshes.experts is not None:
        from titan_core.expert import apply_expert_parallel

        for fqn, role in roles.items():
            if ROLES[role].expert:
                apply_expert_parallel(model.get_submodule(fqn), meshes.experts["ep"])
    _recompute_and_compile(model, roles, remat, compiling, costly)

    routers = Routers(model, roles, meshes, sequence_parallel=config.sequence_parallel)
    dtypes = {"param_dtype": param_dtype, "reduce_dtype": reduce_dtype}
    if stages is None:
        wrapped = shard(model, roles, meshes, config, **dtypes)
        layout: Layout = DataParallel(
            model,
            micro_batch_size,
            routers,
            wrapped,
            meshes,
            grad_sync=config.grad_sync,
            itemsize=reduce_dtype.itemsize,
        )
    else:
        from titan_core.pipeline import Pipeline

        for part in stages.parts.values():
            shard(part, _present(part, roles), meshes, config, **dtypes)
        layout = Pipeline(
            stages,
            routers,
            config,
            meshes.group("pp"),
            size=micro_batch_size,
            width=width,
            sequence_cut=degrees.tp if config.sequence_parallel else 1,
            dtype=param_dtype,
            itemsize=reduce_dtype.itemsize,
        )
    if degrees.cp > 1:
        from titan_core.sequence import OwnTokens

        layout = OwnTokens(layout, meshes.group("cp"), load_balance=config.cp_load_balance)
    return layout


def _recompute_and_compile(
    model: nn.Module, roles: Mapping[str, str], remat: RematConfig, compiling: CompileConfig, costly: Sequence[str]
) -> None:
    if remat.mode == "full":  # around compiled blocks, so that nothing in them can stand in its way
        compile_blocks(model, roles, compiling, remat)
        apply_remat(model, roles, remat, costly)
    else:  # within, so that the compiler sees the operators to keep
        apply_remat(model, roles, remat, costly)
        compile_blocks(model, roles, compiling, remat)


def _present(model: nn.Module, roles: Mapping[str, str]) -> dict[str, str]:
    names = {name for name, _ in model.named_modules()}
    return {fqn: role for fqn, role in roles.items() if fqn in names}


def _hidden_width(model: nn.Module, roles: Mapping[str, str]) -> int:
    """D: the width of the embedding's rows."""
    embedding = next(fqn for fqn, role in roles.items() if role == "embedding")
    return next(model.get_submodule(embedding).parameters()).shape[1]
