"""Every private torch import of this package, in one place; checked on torch 2.13."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor import _utils as dtensor_utils
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "TorchDispatchMode",
    "after_each_backward",
    "around_shape_derivation",
    "compute_local_shape_and_global_offset",
    "cpu_flash_attention",
    "cpu_flash_attention_backward",
    "cuda_flash_attention",
    "cuda_flash_attention_backward",
    "fake_store",
    "fake_tensor_mode",
    "fsdp_axes",
    "fsdp_placement",
    "functional_all_gather",
    "functional_all_reduce",
    "functional_all_to_all",
    "functional_reduce_scatter",
    "fused_adamw",
    "is_fake",
    "overlap_tensor_parallel",
    "pipeline_schedule_from_actions",
    "process_group",
    "schedule_actions",
    "set_activation_budget",
    "trusted_pipeline_shapes",
    "work_of_one_rank",
]


# The operators behind torch.distributed's functional collectives. Its public, in-place functions cannot be compiled,
# and its Python wrappers hand out tensors that wait lazily.
def functional_all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """The ranks' `x`, which must be contiguous, concatenated along dimension 0."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_gather_into_tensor(x, group.size(), group.group_name))


def functional_reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's part along dimension 0 of the sum of the ranks' `x`, which must be contiguous."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.reduce_scatter_tensor(x, "sum", group.size(), group.group_name))


def functional_all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of the ranks' `x`, as a new tensor."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x, "sum", group.group_name))


def functional_all_to_all(x: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
    """Sends `sent[i]` rows of `x`, which must be contiguous, to rank i, and concatenates the `received[i]` from it."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_to_all_single(x, received, sent, group.group_name))


# Attention kernels with their log-sum-exp, which the public scaled_dot_product_attention keeps to itself. All take
# q, out [B, N, Q, H], k, v [B, K, T, H] and lse [B, N, Q], and scale by 1 / sqrt(H).
def cpu_flash_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Result and log-sum-exp (float32, or float64 for float64) on a CPU; `bias` [B, 1, Q, T] is added to the scores."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias)


def cpu_flash_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for `cpu_flash_attention`."""
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=bias)


def cuda_flash_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Result and log-sum-exp (float32) on a GPU, in half precision."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]


def cuda_flash_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for `cuda_flash_attention`."""
    no_dropout = torch.zeros(2, dtype=torch.int64, device=q.device)  # a generator's state, read only with dropout
    lse = lse.contiguous()  # the kernel reads it without its strides
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad_out, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, no_dropout, no_dropout
    )


def pipeline_schedule_from_actions(
    rows: Sequence[Sequence[tuple[int, str, int]]], stages: list[Any], **options: Any
) -> Any:
    """A schedule of torch.distributed.pipelining in which pipeline rank r does the actions `rows[r]`, in this order.

    An action is a stage, `F`, `B`, `I` or `W`, and a micro-batch.
    """
    from torch.distributed.pipelining.schedules import _Action, _ComputationType, _PipelineScheduleRuntime

    schedule = _PipelineScheduleRuntime(stages, **options)
    for rank, row in enumerate(rows):
        schedule.pipeline_order[rank] = [
            _Action(stage, _ComputationType(kind), micro_batch) for stage, kind, micro_batch in row
        ]
    schedule._prepare_schedule_with_comms(schedule.pipeline_order)
    return schedule


def set_activation_budget(share: float) -> None:
    """The share of a compiled region's activations that it may keep; read when a region is compiled."""
    from torch._functorch import config

    config.activation_memory_budget = share
    # Regions with communication carry its group of ranks about, which has no size.
    config.unsafe_treat_script_objects_as_zero_size = True


def fsdp_axes(mesh: DeviceMesh) -> Any:
    """What FSDP2 calls a mesh over which it shards (1-D), or replicates and shards (2-D)."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo

    return FSDPMeshInfo(mesh, 0) if mesh.ndim == 1 else HSDPMeshInfo(mesh, 1, 0)


def fsdp_placement(placement: Shard, axes: Any) -> Any:
    """A result of `shard_placement_fn` that sends one parameter to the mesh of `axes`."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult

    return ShardPlacementResult(placement, axes)


def compute_local_shape_and_global_offset(
    shape: torch.Size, mesh: DeviceMesh, placements: Sequence[Any]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and place of this rank's part of a tensor of `shape`; torch asks tensors for it, which may be fake now."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        return dtensor_utils.compute_local_shape_and_global_offset(shape, mesh, placements)


def fused_adamw(
    tensors: Sequence[Tensor],
    number: Tensor,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    found_inf: Tensor | None,
) -> None:
    """One pass over a parameter, its gradient and its two moments: the step `number`, counted from 1, of AdamW.

    They have one dtype, shape and device; nothing happens if `found_inf` is 1.0. torch.optim's public functions count
    steps themselves.
    """
    parameter, gradient, first, second = tensors
    torch._fused_adamw_(
        [parameter],
        [gradient],
        [first],
        [second],
        [],
        [number],
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        found_inf=found_inf,
    )


def overlap_tensor_parallel() -> None:
    """Lets inductor cut matrix products and the collectives beside them into pieces that overlap."""
    import torch._inductor.config

    torch._inductor.config._micro_pipeline_tp = True


# Rehearsals: fake ranks, fake tensors, and what can be seen of a step.
def fake_store() -> Any:
    """A store for the process group backend `fake`, whose collectives return at once and change nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


@contextlib.contextmanager
def work_of_one_rank(rank: int) -> Iterator[None]:
    """Within it, meshes and FSDP leave out what they do for each rank of the world, which a fake `rank` has no use for.

    A mesh makes groups for the other ranks too. FSDP makes an empty tensor for every rank that gets no part of a
    parameter, in Python; here these ranks share one.
    """
    from torch.distributed import GroupMember, device_mesh
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    new_group = device_mesh.new_group

    def new_own_group(*, ranks: list[int], **options: Any) -> Any:
        return new_group(ranks=ranks, **options) if rank in ranks else GroupMember.NON_GROUP_MEMBER

    def chunks(tensor: Tensor, count: int, dim: int) -> list[Tensor]:
        parts = list(torch.chunk(tensor, count, dim=dim))
        return parts + [parts[0].new_empty(0)] * (count - len(parts))

    with (
        mock.patch.object(device_mesh, "new_group", new_own_group),
        mock.patch.object(_fsdp_param, "_chunk_with_empty", chunks),
    ):
        yield


def fake_tensor_mode() -> Any:
    """Within it, tensors have shapes, dtypes and storages, but no memory and no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def is_fake(tensor: Tensor) -> bool:
    """Whether `tensor` has no values."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


@contextlib.contextmanager
def trusted_pipeline_shapes() -> Iterator[None]:
    """Within it, a pipeline's stages take the shapes they are given without a vote, which fake ranks cannot hold."""
    from torch.distributed.pipelining import schedules
    from torch.distributed.pipelining.stage import InferenceMode

    def trust(schedule: Any, stages: list[Any], has_backward: bool, p2p_done: bool) -> None:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    with mock.patch.object(schedules._PipelineSchedule, "_warmup_p2p", trust):
        yield


@contextlib.contextmanager
def after_each_backward(callback: Callable[[list[Tensor]], None]) -> Iterator[None]:
    """Within it, `callback` gets the gradients that FSDP keeps whole, or has not yet reduced over replicas, whenever
    the backward of one of its units ends.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    post_backward = FSDPParamGroup.post_backward

    def post_backward_and_tell(group: Any, *unused: Any) -> None:
        post_backward(group, *unused)
        kept = [group._partial_reduce_output]
        for parameter in group.fsdp_params:
            kept.append(parameter.unsharded_accumulated_grad)
            kept.append(parameter.unsharded_param.grad if hasattr(parameter, "_unsharded_param") else None)
        callback([gradient for gradient in kept if gradient is not None])

    with mock.patch.object(FSDPParamGroup, "post_backward", post_backward_and_tell):
        yield


@contextlib.contextmanager
def around_shape_derivation(around: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Within it, DTensor enters `around()` when it runs an operator on fakes of whole tensors, to learn its shapes."""
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    derive = ShardingPropagator._propagate_tensor_meta_non_cached

    def derive_within(propagator: Any, schema: Any) -> Any:
        with around():
            return derive(propagator, schema)

    with mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", derive_within):
        yield


def process_group(argument: Any) -> ProcessGroup:
    """The group that an operator of torch.distributed was called with: by name, or as an object of TorchScript."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(cast(Any, argument)) if isinstance(argument, str) else ProcessGroup.unbox(argument)


def schedule_actions(schedule: Any) -> dict[int, list[tuple[int, str, int]]]:
    """Pipeline rank -> what it computes in a step, in order: stage, `F`, `B`, `I` or `W`, and micro-batch.

    `B` is a whole backward, `I` that of activations and `W` that of weights.
    """
    return {rank: _numbered_from_zero([*_computations(order)]) for rank, order in schedule.pipeline_order.items()}


def _numbered_from_zero(actions: list[tuple[int, str, int]]) -> list[tuple[int, str, int]]:
    # The last rank's forwards in 1F1B's order are those of micro-batches 1 to n; what it runs is 0 to n - 1.
    first = min(micro_batch for _, kind, micro_batch in actions if kind == "F")
    return [(stage, kind, batch - first if kind == "F" else batch) for stage, kind, batch in actions]


def _computations(actions: Any) -> Iterator[tuple[int, str, int]]:
    for action in actions:
        if action is None:
            continue
        if action.sub_actions:  # a forward and a backward whose communication overlaps
            yield from _computations(action.sub_actions)
        elif action.is_compute_op:
            yield action.stage_index, action.computation_type.value, action.microbatch_index
