"""FSDP2 that gathers the weights of float8_tensorwise layers as float8: half the bytes of bfloat16.

A weight is rounded with the scale of all its shards, sent as codes, and unpacked where it arrives; the layer rounds it
again with the same scale, which gives the same codes. Results are therefore the same bits with and without, and what
others see of a weight, its shards, its name and the optimizer's states, stays as it was.

The scales need the largest magnitude of each weight. Before `precompute_scales` has been called, every gather finds it
by a collective of its own; after it, one collective a step finds all.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from titan_quant.compat import ShardedParameter, largest_of_ranks, overwrite, sharded_parameters
from titan_quant.formats import FORMATS, scale_factor
from titan_quant.linear import LowPrecisionLinear


class GatherError(RuntimeError):
    """Weights cannot be gathered in float8 as the model is sharded; the message says why."""


class Float8Gather:
    """The float8 gathers of a sharded model."""

    def __init__(self, model: nn.Module) -> None:
        """Takes over the gathers of `model`, which `fully_shard` has wrapped and whose parameters have their memory.

        Only weights of float8_tensorwise layers are affected. Call it before the first forward pass, and after
        `titan_quant.tensor_parallel.share_scales` if that is called.

        Raises:
            GatherError: if FSDP wraps no layer of that recipe, or shards one in a way that this cannot follow.
        """
        self._weights = [
            _Weight(parameter, parameter.module)
            for parameter in sharded_parameters(model)
            if isinstance(parameter.module, LowPrecisionLinear)
            and parameter.module.arithmetic.recipe.gathers_weights
            and parameter.name == "weight"
        ]
        if not self._weights:
            raise GatherError(
                "quant.float8_gather: FSDP gathers no layer of the recipe float8_tensorwise in this model, so there is "
                "nothing to gather in float8. Wrap the model with fully_shard first, or leave the option out."
            )

    @torch.no_grad()
    def precompute_scales(self) -> None:
        """Finds the scales of all weights at once; call it after each optimizer step, and after loading weights."""
        largest = torch.stack([weight.largest_of_shard() for weight in self._weights])
        for group in dict.fromkeys(group for weight in self._weights for group in weight.groups):
            mine = torch.tensor([group in weight.groups for weight in self._weights], device=largest.device)
            largest = torch.where(mine, largest_of_ranks(largest * mine, group), largest)
        for weight, own in zip(self._weights, largest, strict=True):
            weight.precomputed = own


class _Weight:
    """One layer's weight."""

    def __init__(self, parameter: ShardedParameter, module: LowPrecisionLinear) -> None:
        if not parameter.gathers_rows_once():
            raise GatherError(
                "quant.float8_gather: FSDP keeps weights on the host, cuts them along another dimension than their "
                "rows, or leaves them partly gathered after the forward pass; none of these goes with float8. Leave "
                "the option out, or turn that off."
            )
        self._parameter = parameter
        self._module = module
        self._cast = module.arithmetic.recipe.rounding("output")[1]
        self.precomputed: Tensor | None = None
        self._amax: Tensor
        self.groups: tuple[ProcessGroup, ...] = (parameter.group,)
        sharing = module.arithmetic.sharing
        if sharing is not None and "weight" in sharing.cut:
            self.groups += (sharing.group,)
        parameter.set_gather(self._before, self._after)

    def largest_of_shard(self) -> Tensor:
        """The largest magnitude [] of this rank's rows, float32; 0 if it has none."""
        shard = self._parameter.shard
        return shard.abs().amax().float() if shard.numel() else shard.new_zeros((), dtype=torch.float32)

    def _before(
        self, mesh: DeviceMesh, size: torch.Size, stride: tuple[int, ...], module: nn.Module, policy: Any
    ) -> tuple[tuple[Tensor, ...], None]:
        amax = self.precomputed
        if amax is None:
            amax = self.largest_of_shard()
            for group in self.groups:
                amax = largest_of_ranks(amax, group)
        shard = self._parameter.shard
        # Rounded to what layers compute with first, as if it were gathered in that.
        dtype = policy.param_dtype or shard.dtype
        self._amax = amax.to(dtype).float()
        largest = FORMATS[self._cast.format].largest
        scaled = (shard.to(dtype).float() * scale_factor(self._amax, self._cast)).clamp(-largest, largest)
        # Bytes: not every backend knows float8, and none pads it.
        codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
        return (F.pad(codes, (0, 0, 0, self._parameter.padded_rows - codes.shape[0])),), None

    def _after(
        self, gathered: tuple[Tensor, ...], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        if self._amax.is_cuda:  # made on the stream that gathers, used on this one
            self._amax.record_stream(torch.cuda.current_stream())
        self._module.weight_amax = self._amax
        codes = gathered[0].view(torch.float8_e4m3fn)
        values = (codes.float() / scale_factor(self._amax, self._cast)).to(dtype)[: self._parameter.rows]
        if out is None:
            return values, (values,)
        overwrite(out, values)
        return None
