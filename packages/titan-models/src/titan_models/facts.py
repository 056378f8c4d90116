"""Parameter counts and FLOPs of a decoder, from its configuration alone: no model is built, no torch imported."""

import math
from collections.abc import Mapping

from titan_models.config import DecoderConfig


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """FQN -> shape of every parameter, in the model's order; a tied head is not listed."""
    query_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
    block = {
        "attention_norm.weight": (config.dim,),
        "attention.wq.weight": (query_dim, config.dim),
        "attention.wk.weight": (kv_dim, config.dim),
        "attention.wv.weight": (kv_dim, config.dim),
        "attention.wo.weight": (config.dim, query_dim),
        "ffn_norm.weight": (config.dim,),
        "feed_forward.w1.weight": (config.hidden_dim, config.dim),
        "feed_forward.w3.weight": (config.hidden_dim, config.dim),
        "feed_forward.w2.weight": (config.dim, config.hidden_dim),
    }
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (config.vocab_size, config.dim)}
    for layer in range(config.layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes["norm.weight"] = (config.dim,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.dim)
    return shapes


def parameter_count(config: DecoderConfig) -> int:
    """Number of parameters; a shared weight counts once."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def flops_per_token(config: DecoderConfig, seq_len: int, *, causal: bool = True) -> Mapping[str, float]:
    """Forward FLOPs a token by module, averaged over a document of `seq_len` tokens.

    A matrix product costs 2 FLOPs a weight and token. Attention multiplies each query with the keys and its
    weights with the values: 4 * N * H FLOPs for each token it sees, which is (S + 1) / 2 of them on average when
    `causal`, else all S. Norms, activations and the embedding look-up are left out, as in PaLM (arXiv 2204.02311,
    appendix B), which counts full attention (`causal=False`).
    """
    products = {name: shape for name, shape in parameter_shapes(config).items() if len(shape) == 2}
    del products["tok_embeddings.weight"]
    flops = {name.removesuffix(".weight"): 2.0 * math.prod(shape) for name, shape in products.items()}
    flops["lm_head"] = 2.0 * config.vocab_size * config.dim
    seen = (seq_len + 1) / 2 if causal else seq_len
    for layer in range(config.layers):
        flops[f"layers.{layer}.attention.sdpa"] = 4.0 * config.heads * config.head_dim * seen
    return flops


def training_flops_per_token(config: DecoderConfig, seq_len: int, *, causal: bool = True) -> float:
    """FLOPs a token of forward and backward, three times the forward's (arXiv 2204.02311), without recomputation."""
    return 3 * sum(flops_per_token(config, seq_len, causal=causal).values())
