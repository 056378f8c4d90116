"""Rotary position embeddings in the rotate-half layout of Hugging Face, with Llama 3.1's frequency scaling."""

import math

import torch
from torch import Tensor

from titan_models.shape import RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> list[float]:
    """Radians a token for each of the `head_dim / 2` pairs of dimensions (arXiv 2104.09864, sec. 3.4.3).

    With `scaling`, wavelengths far above the original context are stretched by its factor, those far below it
    are kept, and those between are blended (as in the code published with Llama 3.1).
    """
    frequencies = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if scaling is None:
        return frequencies
    return [_stretch(frequency, scaling) for frequency in frequencies]


def _stretch(frequency: float, scaling: RopeScaling) -> float:
    turns = scaling.original_context * frequency / (2 * math.pi)  # full turns within the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    keep = min(max((turns - low) / (high - low), 0.0), 1.0)
    return keep * frequency + (1 - keep) * frequency / scaling.factor


def rope_table(positions: Tensor, frequencies: list[float], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `positions` [B, S]: two tensors [B, S, 1, H/2], in at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    # Without waiting: a GPU would have to finish what it is at.
    rates = torch.tensor(frequencies, dtype=wide).to(positions.device, non_blocking=True)
    angles = (positions.to(wide)[..., None] * rates)[:, :, None, :]
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turns `x` [B, S, N, H] by the angles of `table`; dimension i is paired with i + H/2."""
    cos, sin = table
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
