"""Llama 3, 3.1, 3.2 and 3.3: presets with Meta's published shapes, and the names other formats give the weights.

Shapes: "The Llama 3 Herd of Models" (2024), table 3, and the model cards of Llama 3.2.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from titan_models.config import DecoderConfig
from titan_models.shape import RopeScaling


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
# native rotary layout is Hugging Face's, so the weights move unchanged. The words behind a name are those of
# titan-ckpt's key maps: "untied" is absent where the head is the embedding, "rotary" has the rows of each head in
# pairs, "split" is the dimension that model parallelism cuts.
HUGGING_FACE_KEYS: Mapping[str, str | tuple[str, ...]] = {
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
    "lm_head.weight": ("lm_head.weight", "untied"),
}

# -> the name in Meta's releases (`consolidated.NN.pth`).
META_KEYS: Mapping[str, str | tuple[str, ...]] = {
    "tok_embeddings.weight": ("tok_embeddings.weight", "split 0"),
    "layers.*.attention_norm.weight": "layers.*.attention_norm.weight",
    "layers.*.attention.wq.weight": ("layers.*.attention.wq.weight", "rotary", "split 0"),
    "layers.*.attention.wk.weight": ("layers.*.attention.wk.weight", "rotary", "split 0"),
    "layers.*.attention.wv.weight": ("layers.*.attention.wv.weight", "split 0"),
    "layers.*.attention.wo.weight": ("layers.*.attention.wo.weight", "split 1"),
    "layers.*.ffn_norm.weight": "layers.*.ffn_norm.weight",
    "layers.*.feed_forward.w1.weight": ("layers.*.feed_forward.w1.weight", "split 0"),
    "layers.*.feed_forward.w3.weight": ("layers.*.feed_forward.w3.weight", "split 0"),
    "layers.*.feed_forward.w2.weight": ("layers.*.feed_forward.w2.weight", "split 1"),
    "norm.weight": "norm.weight",
    "lm_head.weight": ("output.weight", "split 0"),
}

# -> the name in a DCP checkpoint of torchtitan 0.3, which has no object above the model.
TORCHTITAN_KEYS: Mapping[str, str | tuple[str, ...]] = {
    "tok_embeddings.weight": "tok_embeddings.weight",
    "layers.*.attention_norm.weight": "layers.*.attention_norm.weight",
    "layers.*.attention.wq.weight": ("layers.*.attention.qkv_linear.wq.weight", "rotary"),
    "layers.*.attention.wk.weight": ("layers.*.attention.qkv_linear.wk.weight", "rotary"),
    "layers.*.attention.wv.weight": "layers.*.attention.qkv_linear.wv.weight",
    "layers.*.attention.wo.weight": "layers.*.attention.wo.weight",
    "layers.*.ffn_norm.weight": "layers.*.ffn_norm.weight",
    "layers.*.feed_forward.w1.weight": "layers.*.feed_forward.w1.weight",
    "layers.*.feed_forward.w3.weight": "layers.*.feed_forward.w3.weight",
    "layers.*.feed_forward.w2.weight": "layers.*.feed_forward.w2.weight",
    "norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}

# -> the name in a checkpoint of torchtune 0.6, in DCP under the object `model`.
TORCHTUNE_KEYS: Mapping[str, str | tuple[str, ...]] = {
    "tok_embeddings.weight": "tok_embeddings.weight",
    "layers.*.attention_norm.weight": "layers.*.sa_norm.scale",
    "layers.*.attention.wq.weight": ("layers.*.attn.q_proj.weight", "rotary"),
    "layers.*.attention.wk.weight": ("layers.*.attn.k_proj.weight", "rotary"),
    "layers.*.attention.wv.weight": "layers.*.attn.v_proj.weight",
    "layers.*.attention.wo.weight": "layers.*.attn.output_proj.weight",
    "layers.*.ffn_norm.weight": "layers.*.mlp_norm.scale",
    "layers.*.feed_forward.w1.weight": "layers.*.mlp.w1.weight",
    "layers.*.feed_forward.w3.weight": "layers.*.mlp.w3.weight",
    "layers.*.feed_forward.w2.weight": "layers.*.mlp.w2.weight",
    "norm.weight": "norm.scale",
    "lm_head.weight": ("output.weight", "untied"),
}

KEYS: Mapping[str, Mapping[str, str | tuple[str, ...]]] = {
    "hf": HUGGING_FACE_KEYS,
    "meta": META_KEYS,
    "torchtitan": TORCHTITAN_KEYS,
    # Before version 0.3 torchtitan had Meta's names.
    "torchtitan-0.2": META_KEYS,
    "torchtune": TORCHTUNE_KEYS,
}

# Foreign names of what follows from the configuration, which some checkpoints hold nevertheless.
DERIVED = ("model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "rope.freqs", "freqs_cis")
