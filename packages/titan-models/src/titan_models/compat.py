"""The one place of this package that touches what torch does not promise; checked with torch 2.13."""

import warnings
from typing import Any
from unittest import mock

from torch import Tensor
from torch.nn.attention import flex_attention as flex


def flex_attention_unfused(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """`flex_attention` on any device, with its backward, computed from whole score matrices.

    torch refuses the backward on a CPU, for want of a fused kernel; its unfused one computes it right.
    """
    with mock.patch.object(flex, "_validate_device"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow, and what the compiler it goes through says of tensors
        return flex.flex_attention(q, k, v, **options)
