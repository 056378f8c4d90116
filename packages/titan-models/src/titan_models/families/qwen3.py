"""Qwen3, dense and with experts: presets with the published shapes, and the names other formats give the weights.

Shapes: "Qwen3 Technical Report" (arXiv 2505.09388), tables 1 and 2, and the `config.json` of each model.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from titan_models.config import DecoderConfig
from titan_models.shape import MoEConfig


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(DecoderConfig):
    """A Qwen3 model: normalised queries and keys, and in some sizes experts."""

    qk_norm: bool = True
    """Whether queries and keys are normalised, each head for itself, before their positions turn them."""
    norm_eps: float = 1e-6
    """Added to the mean square before the root in RMSNorm."""
    rope_theta: float = 1_000_000.0
    """Base of the rotary frequencies."""


def _published(
    *,
    dim: int,
    layers: int,
    heads: int,
    kv_heads: int,
    hidden_dim: int,
    tie_embeddings: bool = False,
    expert_dim: int | None = None,
) -> Qwen3Config:
    """What all published sizes share, and what tells them apart."""
    # Qwen3 balances experts over the global batch; its coefficient is used here with the loss over each row.
    moe = None if expert_dim is None else MoEConfig(experts=128, top_k=8, hidden_dim=expert_dim, balance_loss=1e-3)
    return Qwen3Config(
        vocab_size=151_936,
        head_dim=128,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        hidden_dim=hidden_dim,
        tie_embeddings=tie_embeddings,
        moe=moe,
    )


PRESETS: Mapping[str, Qwen3Config] = {
    # Small enough to learn something on two CPU cores in minutes.
    "debug": Qwen3Config(),
    "debug-moe": Qwen3Config(moe=MoEConfig(experts=8, top_k=2, hidden_dim=256, balance_loss=1e-3)),
    "0.6b": _published(dim=1024, layers=28, heads=16, kv_heads=8, hidden_dim=3072, tie_embeddings=True),
    "1.7b": _published(dim=2048, layers=28, heads=16, kv_heads=8, hidden_dim=6144, tie_embeddings=True),
    "4b": _published(dim=2560, layers=36, heads=32, kv_heads=8, hidden_dim=9728, tie_embeddings=True),
    "8b": _published(dim=4096, layers=36, heads=32, kv_heads=8, hidden_dim=12_288),
    "14b": _published(dim=5120, layers=40, heads=40, kv_heads=8, hidden_dim=17_408),
    "32b": _published(dim=5120, layers=64, heads=64, kv_heads=8, hidden_dim=25_600),
    "30b-a3b": _published(dim=2048, layers=48, heads=32, kv_heads=4, hidden_dim=6144, expert_dim=768),
    "235b-a22b": _published(dim=4096, layers=94, heads=64, kv_heads=4, hidden_dim=12_288, expert_dim=1536),
}

# Native parameter name -> the name in published checkpoints of Qwen3ForCausalLM and Qwen3MoeForCausalLM; the first `*`
# stands for the block's number. A second `*` stands for an expert's number: the native tensor is the stack of those
# tensors, in the order of the experts. Nothing is transposed, and the native rotary layout is Hugging Face's.
HUGGING_FACE_KEYS: Mapping[str, str | tuple[str, ...]] = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.*.attention_norm.weight": "model.layers.*.input_layernorm.weight",
    "layers.*.attention.wq.weight": "model.layers.*.self_attn.q_proj.weight",
    "layers.*.attention.wk.weight": "model.layers.*.self_attn.k_proj.weight",
    "layers.*.attention.wv.weight": "model.layers.*.self_attn.v_proj.weight",
    "layers.*.attention.wo.weight": "model.layers.*.self_attn.o_proj.weight",
    "layers.*.attention.q_norm.weight": "model.layers.*.self_attn.q_norm.weight",
    "layers.*.attention.k_norm.weight": "model.layers.*.self_attn.k_norm.weight",
    "layers.*.ffn_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    "layers.*.feed_forward.w1.weight": "model.layers.*.mlp.gate_proj.weight",
    "layers.*.feed_forward.w3.weight": "model.layers.*.mlp.up_proj.weight",
    "layers.*.feed_forward.w2.weight": "model.layers.*.mlp.down_proj.weight",
    "layers.*.moe.router.gate.weight": "model.layers.*.mlp.gate.weight",
    "layers.*.moe.experts.w1": "model.layers.*.mlp.experts.*.gate_proj.weight",
    "layers.*.moe.experts.w3": "model.layers.*.mlp.experts.*.up_proj.weight",
    "layers.*.moe.experts.w2": "model.layers.*.mlp.experts.*.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": ("lm_head.weight", "untied"),
}

# -> the name in a DCP checkpoint of torchtitan 0.3, which has no object above the model. Its rotary layout of Qwen3 is
# Hugging Face's, and so ours; experts are stacked as here.
TORCHTITAN_KEYS: Mapping[str, str | tuple[str, ...]] = {
    "tok_embeddings.weight": "tok_embeddings.weight",
    "layers.*.attention_norm.weight": "layers.*.attention_norm.weight",
    "layers.*.attention.wq.weight": "layers.*.attention.qkv_linear.wq.weight",
    "layers.*.attention.wk.weight": "layers.*.attention.qkv_linear.wk.weight",
    "layers.*.attention.wv.weight": "layers.*.attention.qkv_linear.wv.weight",
    "layers.*.attention.wo.weight": "layers.*.attention.wo.weight",
    "layers.*.attention.q_norm.weight": "layers.*.attention.q_norm.weight",
    "layers.*.attention.k_norm.weight": "layers.*.attention.k_norm.weight",
    "layers.*.ffn_norm.weight": "layers.*.ffn_norm.weight",
    "layers.*.feed_forward.w1.weight": "layers.*.feed_forward.w1.weight",
    "layers.*.feed_forward.w3.weight": "layers.*.feed_forward.w3.weight",
    "layers.*.feed_forward.w2.weight": "layers.*.feed_forward.w2.weight",
    "layers.*.moe.router.gate.weight": "layers.*.moe.router.gate.weight",
    "layers.*.moe.experts.w1": "layers.*.moe.routed_experts.inner_experts.w1_EFD",
    "layers.*.moe.experts.w3": "layers.*.moe.routed_experts.inner_experts.w3_EFD",
    "layers.*.moe.experts.w2": "layers.*.moe.routed_experts.inner_experts.w2_EDF",
    "norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}

KEYS: Mapping[str, Mapping[str, str | tuple[str, ...]]] = {"hf": HUGGING_FACE_KEYS, "torchtitan": TORCHTITAN_KEYS}

# Foreign names of what follows from the configuration or from training, which some checkpoints hold nevertheless.
DERIVED = ("model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
