"""Logits and sizes against the reference: transformers' LlamaForCausalLM and Meta's published counts."""

import dataclasses
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from titan_models.facts import parameter_count
from titan_models.families.llama3 import HUGGING_FACE_KEYS, PRESETS
from titan_models.shape import RopeScaling

PUBLISHED = {
    "1b": 1_235_814_400,
    "3b": 3_212_749_824,
    "8b": 8_030_261_248,
    "70b": 70_553_706_496,
    "405b": 405_853_388_800,
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(preset):
    config = PRESETS[preset]
    assert parameter_count(config) == PUBLISHED[preset]
    with torch.device("meta"):
        model = config.build()
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[preset]


def as_hugging_face(model, config):
    """The same weights in transformers' model."""
    scaling = config.rope_scaling
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.hidden_dim,
            rms_norm_eps=config.norm_eps,
            max_position_embeddings=1 << 17,
            rope_parameters=rope,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="sdpa",
        )
    )
    names = {}
    for name, parameter in model.named_parameters():
        layer = re.search(r"\.(\d+)\.", name)
        key = re.sub(r"\.\d+\.", ".*.", name)
        entry = HUGGING_FACE_KEYS[key]
        names[(entry if isinstance(entry, str) else entry[0]).replace("*", layer[1] if layer else "")] = parameter
    missing, unexpected = reference.load_state_dict(names, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if config.tie_embeddings else [])
    reference.tie_weights()
    return reference.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("scaling", [None, RopeScaling(factor=8.0, original_context=64)])
def test_logits_equal_those_of_transformers(tiny, filled, scaling, kv_heads, tied):
    # A small rotary base and positions far beyond the original context make the scaling matter.
    changes = {"rope_scaling": scaling, "kv_heads": kv_heads, "tie_embeddings": tied, "rope_theta": 500.0}
    model = filled(tiny, **changes)
    config = dataclasses.replace(tiny, **changes)
    tokens = torch.randint(0, tiny.vocab_size, (2, 200), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(200).expand(2, 200)
    with torch.no_grad():
        ours = model(tokens, positions)
        theirs = as_hugging_face(model, config)(tokens).logits
    assert theirs.std() > 0.1  # else a small difference would mean nothing
    assert (ours - theirs).abs().max() < 1e-4


def test_rope_scaling_changes_the_logits(tiny, filled):
    tokens = torch.randint(0, tiny.vocab_size, (1, 200), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(200).expand(1, 200)
    scaled = filled(tiny, rope_theta=500.0, rope_scaling=RopeScaling(original_context=64))
    plain = filled(tiny, rope_theta=500.0)
    assert (scaled(tokens, positions) - plain(tokens, positions)).abs().max() > 1e-2
