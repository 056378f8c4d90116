"""Every private import of this package, in one place; checked on torch 2.13 and torchao 0.18."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup


# The operators behind torch.distributed's functional collectives. Its public, in-place functions cannot be compiled,
# and its Python wrappers hand out tensors that wait lazily.
def largest_of_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """Element by element the largest of the ranks' `x`, as a new tensor."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "max", group.group_name))


def gather_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """The ranks' `x`, which must be contiguous, concatenated along dimension 0."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_gather_into_tensor(x, group.size(), group.group_name))


def sum_scattered(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's part along dimension 0 of the sum of the ranks' `x`, which must be contiguous."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.reduce_scatter_tensor(x, "sum", group.size(), group.group_name))


def mxfp8_linear(x: Tensor, weight: Tensor, rounding: str) -> Tensor:
    """Torchao's MXFP8 product of `x` [T, K] with `weight` [N, K] -> [T, N], all multiples of 32; with its gradients."""
    from torchao.prototype.moe_training.mxfp8_linear import _to_mxfp8_then_scaled_mm
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.quantization.quantize_.common import KernelPreference

    return _to_mxfp8_then_scaled_mm(x, weight, KernelPreference.AUTO, ScaleCalculationMode(rounding))


def mxfp8_grouped(x: Tensor, weight: Tensor, ends: Tensor, rounding: str) -> Tensor:
    """Torchao's MXFP8 grouped product of `x` [T, K] with `weight` [E, N, K] -> [T, N]; groups end at `ends` [E] int32,
    at multiples of 32.
    """
    from torchao.prototype.moe_training.mxfp8_grouped_mm import _to_mxfp8_then_scaled_grouped_mm
    from torchao.prototype.mx_formats.config import ScaleCalculationMode

    return _to_mxfp8_then_scaled_grouped_mm(
        x, weight.transpose(1, 2), ends, out_dtype=x.dtype, scale_calculation_mode=ScaleCalculationMode(rounding)
    )


def float8_rowwise_grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Torchao's float8 grouped product with power-of-two scales for rows; as `mxfp8_grouped`, multiples of 16."""
    from torchao.prototype.moe_training.fp8_grouped_mm import _to_fp8_rowwise_then_scaled_grouped_mm

    return _to_fp8_rowwise_then_scaled_grouped_mm(
        x, weight.transpose(1, 2), ends, out_dtype=x.dtype, pad_token_groups_for_grouped_mm=False
    )


def packed_e2m1(codes: Tensor) -> Tensor:
    """float32 numbers of the format, [R, C] -> `float4_e2m1fn_x2` [R, C / 2]."""
    from torchao.prototype.mx_formats.kernels import f32_to_f4_unpacked, pack_uint4

    return pack_uint4(f32_to_f4_unpacked(codes)).view(torch.float4_e2m1fn_x2)


def swizzled_scales(scale: Tensor) -> Tensor:
    """Block scales [R, blocks] in the order in which the tensor cores read them."""
    from torchao.prototype.mx_formats.utils import to_blocked

    return to_blocked(scale)


class ShardedParameter:
    """What FSDP knows of one parameter that `fully_shard` has wrapped, and a way to change how it is gathered."""

    def __init__(self, record: Any) -> None:
        self._record = record
        record.reset_sharded_param()  # sees memory that was given after sharding; does nothing the second time
        self.module: nn.Module = record._module_info.module
        self.name: str = record._module_info.param_name
        self.rows: int = record._orig_size[0]
        self.padded_rows: int = record.padded_sharded_param_size[0]
        """Of a shard, with those that make all shards equal."""

    @property
    def shard(self) -> Tensor:
        """This rank's rows."""
        return self._record._sharded_local_tensor

    @property
    def group(self) -> ProcessGroup:
        """The ranks that hold the shards."""
        return self._record.shard_mesh.get_group()

    def gathers_rows_once(self) -> bool:
        """Whether it is cut by rows, kept on the device, and after the forward pass whole or cut as before."""
        after = self._record.post_forward_mesh_info
        same = after is None or after is self._record.mesh_info
        return same and not self._record.offload_to_cpu and self._record.fsdp_placement.dim == 0

    def set_gather(self, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        """Lets FSDP gather what `before` makes of a shard, and use what `after` makes of all.

        Both are as FSDP's extensions for tensors want them. A tensor subclass would be the official way, but would show
        in checkpoints and in the optimizer's states.
        """
        shard: Any = self.shard
        shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = before, after
        self._record._init_extensions()


def sharded_parameters(model: nn.Module) -> Iterator[ShardedParameter]:
    """Each parameter of `model` that FSDP shards; all must have their memory."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                yield from map(ShardedParameter, group.fsdp_params)


def overwrite(out: Tensor, values: Tensor) -> None:
    """Writes `values` into `out`, a parameter that FSDP gives its memory back, behind autograd's back."""
    tensor = getattr(out, "_local_tensor", out)  # views that autograd knows start from a DTensor's own tensor
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tensor):
        tensor.copy_(values)
