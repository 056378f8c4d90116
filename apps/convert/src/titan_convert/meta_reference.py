"""Llama 3 as Meta's release computes it, on Meta's weights: rotary embeddings as complex numbers, neighbours paired.

Nothing here is shared with titan-models: it exists to disagree with it if a conversion goes wrong. Formulas: Meta's
"llama-models", `Transformer`, `apply_rotary_emb` and `apply_scaling`; float32, a prompt without cache.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SPLITS: Mapping[str, int | None] = {
    "tok_embeddings.weight": 0,
    "output.weight": 0,
    "attention.wq.weight": 0,
    "attention.wk.weight": 0,
    "attention.wv.weight": 0,
    "attention.wo.weight": 1,
    "feed_forward.w1.weight": 0,
    "feed_forward.w3.weight": 0,
    "feed_forward.w2.weight": 1,
}
"""Which dimension of a tensor is cut by model parallelism, by its name without the block."""


def logits(
    params: Mapping[str, Any], weights: Mapping[str, Tensor], tokens: Tensor, layers: int, scaling: Any
) -> Tensor:
    """Logits [B, S, V] of `tokens` [B, S], by the first `layers` blocks.

    `scaling` has the numbers of the frequencies' scaling, which params.json doesn't tell; None: there is none.
    """
    heads, eps = params["n_heads"], params["norm_eps"]
    head_dim = params["dim"] // heads
    turns = _turns(head_dim, params["rope_theta"], tokens.shape[1], scaling)
    x = weights["tok_embeddings.weight"][tokens]
    for layer in range(layers):
        own = {name.removeprefix(f"layers.{layer}."): w for name, w in weights.items()}
        hidden = _norm(x, own["attention_norm.weight"], eps)
        q, k, v = (
            (hidden @ own[f"attention.w{name}.weight"].T).unflatten(-1, (-1, head_dim)).transpose(1, 2)
            for name in "qkv"
        )
        k, v = (part.repeat_interleave(heads // part.shape[1], 1) for part in (k, v))
        scores = _turned(q, turns) @ _turned(k, turns).transpose(-1, -2) / math.sqrt(head_dim)
        future = torch.full_like(scores, -math.inf).triu(1)
        mixed = ((scores + future).softmax(-1) @ v).transpose(1, 2).flatten(-2)
        x = x + mixed @ own["attention.wo.weight"].T
        hidden = _norm(x, own["ffn_norm.weight"], eps)
        gate = F.silu(hidden @ own["feed_forward.w1.weight"].T)
        x = x + (gate * (hidden @ own["feed_forward.w3.weight"].T)) @ own["feed_forward.w2.weight"].T
    return _norm(x, weights["norm.weight"], eps) @ weights.get("output.weight", weights["tok_embeddings.weight"]).T


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _turns(head_dim: int, theta: float, length: int, scaling: Any) -> Tensor:
    """Unit complex numbers [S, H/2] by which neighbours are multiplied."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).double() / head_dim)
    if scaling is not None:
        wavelengths = 2 * math.pi / frequencies
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        smooth = (scaling.original_context / wavelengths - low) / (high - low)
        blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
        frequencies = torch.where(wavelengths < scaling.original_context / high, frequencies, blended)
        stretched = 2 * math.pi / wavelengths / scaling.factor
        frequencies = torch.where(wavelengths > scaling.original_context / low, stretched, frequencies)
    angles = torch.outer(torch.arange(length).double(), frequencies)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """`x` [B, N, S, H] with neighbouring dimensions as the two parts of a complex number."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2)
