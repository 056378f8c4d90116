"""Llama 3, 3.1, 3.2 and 3.3: presets with Meta's published shapes, and the names other formats give the weights.

Shapes: "The Llama 3 Herd of Models" (2024), table 3, and the model cards of Llama 3.2.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from titan_models.config import DecoderConfig, RopeScaling


@dataclass(frozen=True, kw_only=True)
class Llama3Config(DecoderConfig):
    """A Llama 3 model."""


_LONG_CONTEXT = RopeScaling(factor=8.0)
_LONG_CONTEXT_SMALL = RopeScaling(factor=32.0)

PRESETS: Mapping[str, Llama3Config] = {
    # Small enough to learn something on two CPU cores in two minutes.
    "debug": Llama3Config(),
    "1b": Llama3Config(
        vocab_size=128_256,
        dim=2048,
        layers=16,
        heads=32,
        kv_heads=8,
        head_dim=64,
        hidden_dim=8192,
        rope_scaling=_LONG_CONTEXT_SMALL,
        tie_embeddings=True,
    ),
    "3b": Llama3Config(
        vocab_size=128_256,
        dim=3072,
        layers=28,
        heads=24,
        kv_heads=8,
        head_dim=128,
        hidden_dim=8192,
        rope_scaling=_LONG_CONTEXT_SMALL,
        tie_embeddings=True,
    ),
    "8b": Llama3Config(
        vocab_size=128_256,
        dim=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        hidden_dim=14_336,
        rope_scaling=_LONG_CONTEXT,
    ),
    "70b": Llama3Config(
        vocab_size=128_256,
        dim=8192,
        layers=80,
        heads=64,
        kv_heads=8,
        head_dim=128,
        hidden_dim=28_672,
        rope_scaling=_LONG_CONTEXT,
    ),
    "405b": Llama3Config(
        vocab_size=128_256,
        dim=16_384,
        layers=126,
        heads=128,
        kv_heads=8,
        head_dim=128,
        hidden_dim=53_248,
        rope_scaling=_LONG_CONTEXT,
    ),
}

# Native parameter name -> the name in Hugging Face's LlamaForCausalLM; `*` stands for the block's number. The
# native rotary layout is Hugging Face's, so the weights move unchanged.
HUGGING_FACE_KEYS: Mapping[str, str] = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.*.attention_norm.weight": "model.layers.*.input_layernorm.weight",
    "layers.*.attention.wq.weight": "model.layers.*.self_attn.q_proj.weight",
    "layers.*.attention.wk.weight": "model.layers.*.self_attn.k_proj.weight",
    "layers.*.attention.wv.weight": "model.layers.*.self_attn.v_proj.weight",
    "layers.*.attention.wo.weight": "model.layers.*.self_attn.o_proj.weight",
    "layers.*.ffn_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    "layers.*.feed_forward.w1.weight": "model.layers.*.mlp.gate_proj.weight",
    "layers.*.feed_forward.w3.weight": "model.layers.*.mlp.up_proj.weight",
    "layers.*.feed_forward.w2.weight": "model.layers.*.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
