"""The order in which techniques are applied to a model: one screen."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from titan_core.compiling import compile_blocks
from titan_core.config import CompileConfig, ParallelConfig, RematConfig
from titan_core.layout import Layout
from titan_core.mesh import Meshes
from titan_core.remat import apply_remat
from titan_core.routers import Routers
from titan_core.single import SingleDevice
from titan_core.tensor_styles import AS_USUAL, TensorStyles


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
    styles: TensorStyles = AS_USUAL,
) -> Layout:
    """Lays out `model`, whose parameters may still be meta tensors; `roles` as `resolve_roles` returns them.

    Without meshes the model stays on one device. Parameters keep their dtype: it is what the optimizer works on;
    `param_dtype` is what forward and backward compute with, `reduce_dtype` what gradients are reduced in.
    `micro_batch_size` is in rows. `costs` (FQN -> any unit) balance the stages of a pipeline.
    `costly`: the model's own operators whose results selective recomputation keeps. `styles`: what a rewrite of the
    model changes in tensor parallelism.

    Raises:
        TensorStyleError: if names in `styles` fit nothing in the model.
    """
    styles.check(roles)
    if meshes is None:
        recompute_and_compile(model, roles, remat, compiling, costly)
        routers = Routers(model, roles)
        return SingleDevice(model, micro_batch_size, routers, param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    # What follows costs most of a second to import, which one device need not pay.
    from titan_core.expert import apply_expert_parallel
    from titan_core.fsdp import DataParallel, shard
    from titan_core.sequence import OwnTokens, apply_context_parallel
    from titan_core.tensor import apply_tensor_parallel

    width = _hidden_width(model, roles)
    parts: Iterable[nn.Module] = [model]
    stages = None
    if meshes.degrees.pp > 1:
        from titan_core.pipelining.pipeline import cut_into_stages

        stages = cut_into_stages(model, roles, config, meshes.data.get_local_rank("pp"), costs or {})
        model, parts = stages.model, stages.parts.values()
        roles = _present(model, roles)

    apply_tensor_parallel(model, roles, meshes, config, styles)
    apply_context_parallel(model, roles, meshes, config)
    apply_expert_parallel(model, roles, meshes)
    recompute_and_compile(model, roles, remat, compiling, costly)
    dtypes = {"param_dtype": param_dtype, "reduce_dtype": reduce_dtype}
    wrapped = [module for part in parts for module in shard(part, _present(part, roles), meshes, config, **dtypes)]

    routers = Routers(model, roles, meshes, sequence_parallel=config.sequence_parallel)
    if stages is None:
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
        from titan_core.pipelining.pipeline import Pipeline

        layout = Pipeline(
            stages,
            routers,
            config,
            meshes.group("pp"),
            size=micro_batch_size,
            width=width,
            sequence_cut=meshes.degrees.tp if config.sequence_parallel else 1,
            dtype=param_dtype,
            itemsize=reduce_dtype.itemsize,
        )
    return layout if meshes.degrees.cp == 1 else OwnTokens(layout, meshes, config)


def recompute_and_compile(
    model: nn.Module, roles: Mapping[str, str], remat: RematConfig, compiling: CompileConfig, costly: Sequence[str]
) -> None:
    """Changes the blocks of `model`, in the order that the kind of recomputation needs."""
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
