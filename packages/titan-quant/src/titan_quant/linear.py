"""A linear layer that computes in a recipe's arithmetic.

A layer is converted by giving it another class: its name, its parameters and theirs, its hooks and what shares its
weight stay as they are, so that checkpoints fit with every recipe and with none.
"""

from typing import Any

import torch
from torch import Tensor, nn

from titan_quant.arithmetic import Arithmetic, linear
from titan_quant.kernels import mxfp8


class LowPrecisionLinear(nn.Linear):
    """`nn.Linear` of which a recipe computes the products; what `convert_linear` makes of one."""

    arithmetic: Arithmetic
    weight_amax: Tensor | None
    """The weight's largest magnitude [] float32, where something else has found it (`titan_quant.float8_gather`)."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` [.., K] -> [.., N], of its dtype."""
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
            input, weight = input.to(dtype), weight.to(dtype)
        casts = self.arithmetic.recipe.output
        if casts and casts[0].scale == "e8m0" and not self.arithmetic.emulate:
            out = mxfp8(input, weight, casts[0].rounding)
        else:
            out = linear(input, weight, self.arithmetic, self.weight_amax)
        return out if bias is None else out + bias.to(out.dtype)

    def extra_repr(self) -> str:
        """The layer's sizes, and to what its operands are rounded."""
        emulated = ", emulated" if self.arithmetic.emulate else ""
        casts = self.arithmetic.recipe.output or ()
        formats = " x ".join(f"{cast.format} by {cast.scope}" for cast in casts)
        return f"{super().extra_repr()}, {formats}{emulated}"


def convert_linear(module: Any, arithmetic: Arithmetic) -> None:
    """Makes `module`, an `nn.Linear`, compute in `arithmetic`."""
    module.__class__ = LowPrecisionLinear
    module.arithmetic = arithmetic
    module.weight_amax = None
