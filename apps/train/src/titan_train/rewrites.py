"""Low precision and LoRA: what they change in a model before it is laid out, and what others must know of it."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from titan_core.tensor_styles import TensorStyles
from titan_models.facts import flops_per_token, parameter_count
from titan_quant.convert import Conversion, quantize
from titan_quant.flops import flops_by_precision
from titan_quant.lora import TENSOR_PARALLEL, Adapters, add_lora
from titan_quant.tensor_parallel import float8_regions, gather_float8, scatter_sum_float8
from titan_train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Rewrites:
    """What was changed; nothing, for a run that asks for nothing."""

    conversion: Conversion
    """The layers that compute in low precision."""
    adapters: Adapters
    """The layers that have LoRA adapters."""

    def describe(self, config: TrainConfig) -> str:
        """A few lines for a person; empty if nothing was changed."""
        lines = []
        if self.conversion.linears or self.conversion.experts:
            emulated = ", emulated" if config.quant.emulate else ""
            lines += [f"quantization {config.quant.recipe}{emulated}", *map("    {}".format, self.conversion.lines())]
        if self.adapters.layers:
            whole = parameter_count(config.model)
            lines.append(f"LoRA of rank {config.lora.rank} on {len(self.adapters.layers)} layers; {whole:,} are frozen")
        return "\n".join(lines)

    def styles(self, roles: Mapping[str, str]) -> TensorStyles:
        """What tensor parallelism does otherwise."""
        regions = float8_regions(self.conversion, roles)
        return TensorStyles(
            entered=regions.entered,
            left=regions.left,
            gather=gather_float8,
            scatter_sum=scatter_sum_float8,
            added=TENSOR_PARALLEL if self.adapters.layers else {},
        )

    def flops_by_precision(self, config: TrainConfig) -> dict[str, float]:
        """The share of FLOPs in `high` precision, `float8` and `float4`."""
        forward = flops_per_token(config.model, config.training.seq_len)
        converted = [*self.conversion.linears, *self.conversion.experts]
        return flops_by_precision(forward, converted, self.conversion.recipe)


def rewrite(model: nn.Module, config: TrainConfig, roles: Mapping[str, str]) -> Rewrites:
    """Changes a whole model, which nothing has laid out yet; names and parameters that are there stay as they are.

    Raises:
        ValueError: if names in the configuration fit nothing, or nothing would be changed.
    """
    conversion = quantize(model, config.quant, roles)
    return Rewrites(conversion=conversion, adapters=add_lora(model, config.lora, roles))
