"""Tiny models of transformers, saved as transformers saves them, and the same weights as Meta would publish them."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch

SHAPE = {
    "vocab_size": 132,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 80,
    "rms_norm_eps": 1e-5,
}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
# Meta's format needs heads that make up the width, and has 4 shards only with 4 heads of keys.
META = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**SHAPE, "rope_parameters": PLAIN}),
    "llama-tied": ("LlamaConfig", {**SHAPE, "rope_parameters": PLAIN, "tie_word_embeddings": True}),
    "llama-scaled": ("LlamaConfig", {**SHAPE, **META, "rope_parameters": SCALED, "bos_token_id": 7}),
    "llama-scaled-tied": (
        "LlamaConfig",
        {**SHAPE, **META, "rope_parameters": SCALED, "tie_word_embeddings": True, "num_hidden_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {**SHAPE, "rope_parameters": PLAIN}),
    "qwen3-tied": ("Qwen3Config", {**SHAPE, "rope_parameters": PLAIN, "tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3MoeConfig", {**SHAPE, "rope_parameters": PLAIN, **EXPERTS}),
    "qwen3-moe-dense-first": ("Qwen3MoeConfig", {**SHAPE, "rope_parameters": PLAIN, **EXPERTS, "mlp_only_layers": [0]}),
}


def save(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """Saves a model of a kind with `save_pretrained`, weights of a size that lets every part matter."""
    import transformers

    name, values = KINDS[kind]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**values), dtype=dtype)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape) * 0.1
            parameter.copy_(1 + noise if "norm" in key else noise)
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")


def logits(folder: Path, length: int = 24) -> torch.Tensor:
    """Of transformers' model, which must find all its weights and nothing else."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
    assert not any(report.values()), report
    with torch.no_grad():
        return model.eval()(torch.arange(length)[None]).logits


def native_logits(folder: Path, length: int = 24) -> torch.Tensor:
    """Of our model, built and filled as a training run does it from `files/model.json`."""
    from titan_ckpt.checkpoint import open_checkpoint
    from titan_ckpt.checkpointer import Checkpointer
    from titan_models.model_file import from_json

    found = open_checkpoint(folder)
    model = from_json(found.read_file("model.json")).build()
    Checkpointer(folder.parent).load(found, {"model": model})
    tokens = torch.arange(length)[None]
    with torch.no_grad():
        return model(tokens, tokens)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of safetensors files."""
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def as_meta(hf: Path, folder: Path, shards: int) -> None:
    """The weights of a Hugging Face folder as Meta would publish them, by the formulas of its releases."""
    config = json.loads((hf / "config.json").read_text())
    dim, heads, rope = config["hidden_size"], config["num_attention_heads"], config["rope_parameters"]
    found = weights(hf)

    def pairs(weight: torch.Tensor) -> torch.Tensor:
        """Rows i and i + H/2 of each head become neighbours."""
        rows = [
            head * (dim // heads) + half * (dim // heads // 2) + i
            for head in range(weight.shape[0] // (dim // heads))
            for i in range(dim // heads // 2)
            for half in range(2)
        ]
        return weight[rows]

    whole: dict[str, tuple[torch.Tensor, int | None]] = {
        "tok_embeddings.weight": (found["model.embed_tokens.weight"], 0),
        "output.weight": (found.get("lm_head.weight", found["model.embed_tokens.weight"]), 0),
        "norm.weight": (found["model.norm.weight"], None),
    }
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        whole |= {
            f"{ours}.attention.wq.weight": (pairs(found[f"{theirs}.self_attn.q_proj.weight"]), 0),
            f"{ours}.attention.wk.weight": (pairs(found[f"{theirs}.self_attn.k_proj.weight"]), 0),
            f"{ours}.attention.wv.weight": (found[f"{theirs}.self_attn.v_proj.weight"], 0),
            f"{ours}.attention.wo.weight": (found[f"{theirs}.self_attn.o_proj.weight"], 1),
            f"{ours}.feed_forward.w1.weight": (found[f"{theirs}.mlp.gate_proj.weight"], 0),
            f"{ours}.feed_forward.w2.weight": (found[f"{theirs}.mlp.down_proj.weight"], 1),
            f"{ours}.feed_forward.w3.weight": (found[f"{theirs}.mlp.up_proj.weight"], 0),
            f"{ours}.attention_norm.weight": (found[f"{theirs}.input_layernorm.weight"], None),
            f"{ours}.ffn_norm.weight": (found[f"{theirs}.post_attention_layernorm.weight"], None),
        }
    folder.mkdir()
    for rank in range(shards):
        own = {name: (w if d is None else w.chunk(shards, d)[rank]).clone() for name, (w, d) in whole.items()}
        torch.save(own, folder / f"consolidated.{rank:02}.pth")
    base = int(8 * dim / 3)
    params = {
        "dim": dim,
        "n_layers": config["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": config["num_key_value_heads"],
        "vocab_size": config["vocab_size"],
        "multiple_of": 1,
        "ffn_dim_multiplier": math.nextafter((config["intermediate_size"] + 0.5) / base, 0),
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": rope["rope_theta"],
        "use_scaled_rope": rope["rope_type"] == "llama3",
    }
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_bytes(b"tokens")
