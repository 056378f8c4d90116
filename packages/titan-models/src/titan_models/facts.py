"""Parameter counts and FLOPs of a decoder, from its configuration alone: no model is built, no torch imported."""

import math
from collections.abc import Mapping

from titan_models.shape import DecoderShape

# Tokens whose logits exist at one time while the loss is computed. On a CPU a chunk that stays in its caches is a fifth
# faster than 1024 tokens; on a GPU each chunk costs a pass over a gradient as large as the weight, so there few are
# better.
CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS = 256, 2048


def parameter_shapes(config: DecoderShape) -> dict[str, tuple[int, ...]]:
    """FQN -> shape of every parameter, in the model's order; a tied head is not listed."""
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (config.vocab_size, config.dim)}
    for layer in range(config.layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in _block_shapes(config, layer).items()}
    shapes["norm.weight"] = (config.dim,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.dim)
    return shapes


def _block_shapes(config: DecoderShape, layer: int) -> dict[str, tuple[int, ...]]:
    query_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm.weight": (config.dim,),
        "attention.wq.weight": (query_dim, config.dim),
        "attention.wk.weight": (kv_dim, config.dim),
        "attention.wv.weight": (kv_dim, config.dim),
    }
    if config.qk_norm:
        shapes |= {"attention.q_norm.weight": (config.head_dim,), "attention.k_norm.weight": (config.head_dim,)}
    shapes |= {"attention.wo.weight": (config.dim, query_dim), "ffn_norm.weight": (config.dim,)}
    moe = config.moe
    if moe is None or not config.has_experts(layer):
        return shapes | _feed_forward_shapes("feed_forward", config.dim, config.hidden_dim)
    shapes |= {
        "moe.router.gate.weight": (moe.experts, config.dim),
        "moe.experts.w1": (moe.experts, moe.hidden_dim, config.dim),
        "moe.experts.w3": (moe.experts, moe.hidden_dim, config.dim),
        "moe.experts.w2": (moe.experts, config.dim, moe.hidden_dim),
    }
    if moe.shared_hidden_dim:
        shapes |= _feed_forward_shapes("moe.shared", config.dim, moe.shared_hidden_dim)
    return shapes


def _feed_forward_shapes(name: str, dim: int, hidden_dim: int) -> dict[str, tuple[int, ...]]:
    inward, outward = (hidden_dim, dim), (dim, hidden_dim)
    return {f"{name}.w1.weight": inward, f"{name}.w3.weight": inward, f"{name}.w2.weight": outward}


def state_shapes(config: DecoderShape) -> dict[str, tuple[int, ...]]:
    """FQN -> shape of every tensor in the model's state dict, without further names of the same tensor."""
    shapes = parameter_shapes(config)
    if config.moe is not None and config.moe.bias_update_rate:
        layers = (layer for layer in range(config.layers) if config.has_experts(layer))
        shapes |= {f"layers.{layer}.moe.router.bias": (config.moe.experts,) for layer in layers}
    return shapes


def shared_names(config: DecoderShape) -> dict[str, str]:
    """FQN -> the FQN in `state_shapes` of the tensor that it is a further name of."""
    return {"lm_head.weight": "tok_embeddings.weight"} if config.tie_embeddings else {}


def parameter_count(config: DecoderShape) -> int:
    """Number of parameters; a shared weight counts once."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def active_parameter_count(config: DecoderShape) -> int:
    """Number of parameters that one token passes: all but those of the experts it is not handed to."""
    return sum(_active(config, shape) for shape in parameter_shapes(config).values())


def _active(config: DecoderShape, shape: tuple[int, ...]) -> int:
    # Only the stacked weights of experts have three dimensions.
    if config.moe is None or len(shape) < 3:
        return math.prod(shape)
    return math.prod(shape) // config.moe.experts * config.moe.top_k


def flops_per_token(
    config: DecoderShape, seq_len: int, *, causal: bool = True, seen: float | None = None
) -> Mapping[str, float]:
    """Forward FLOPs a token by module, averaged over a document of `seq_len` tokens.

    A matrix product costs 2 FLOPs a weight and token, of experts only those that the token is handed to. Attention
    multiplies each query with the keys and its weights with the values: 4 * N * H FLOPs for each token it sees, itself
    included. That is `seen` of them on average, if something else than the row confines attention: documents, of which
    a token sees its position and itself, or a window. Else it is (S + 1) / 2 when `causal`, or all S. Norms,
    activations, the embedding look-up and the weighted sum of experts' outputs are left out, as in PaLM (arXiv
    2204.02311, appendix B), which counts full attention (`causal=False`).
    """
    shapes = parameter_shapes(config)
    del shapes["tok_embeddings.weight"]
    flops: dict[str, float] = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            # The three weights of experts belong to one module.
            module = name.rpartition(".")[0]
            flops[module] = flops.get(module, 0.0) + 2.0 * _active(config, shape)
    flops["lm_head"] = 2.0 * config.vocab_size * config.dim
    if seen is None:
        seen = (seq_len + 1) / 2 if causal else seq_len
    for layer in range(config.layers):
        flops[f"layers.{layer}.attention.sdpa"] = 4.0 * config.heads * config.head_dim * seen
    return flops


def training_flops_per_token(
    config: DecoderShape, seq_len: int, *, causal: bool = True, seen: float | None = None
) -> float:
    """FLOPs a token of forward and backward, three times the forward's (arXiv 2204.02311), without recomputation.

    `causal` and `seen` as for `flops_per_token`.
    """
    return 3 * sum(flops_per_token(config, seq_len, causal=causal, seen=seen).values())
