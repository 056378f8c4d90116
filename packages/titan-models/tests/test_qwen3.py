"""Logits, gradients and sizes against the reference: transformers' Qwen3 and Qwen3-MoE, loaded from published names."""

import dataclasses
import re

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config as DenseReferenceConfig
from transformers import Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from titan_models.facts import active_parameter_count, parameter_count
from titan_models.families.qwen3 import HUGGING_FACE_KEYS, PRESETS, Qwen3Config
from titan_models.shape import MoEConfig

DENSE = Qwen3Config(vocab_size=131, dim=48, layers=2, heads=6, kv_heads=2, head_dim=16, hidden_dim=80)
EXPERTS = dataclasses.replace(DENSE, moe=MoEConfig(experts=8, top_k=3, hidden_dim=24))


def reference_config(config):
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
    }
    if config.moe is None:
        return DenseReferenceConfig(**shared)
    return Qwen3MoeConfig(
        **shared,
        num_experts=config.moe.experts,
        num_experts_per_tok=config.moe.top_k,
        moe_intermediate_size=config.moe.hidden_dim,
        norm_topk_prob=config.moe.normalize_weights,
    )


def reference_class(config):
    return Qwen3ForCausalLM if config.moe is None else Qwen3MoeForCausalLM


def published(name, tensor):
    """The tensors that a published checkpoint holds for a native one, under their names."""
    layer = re.search(r"\.(\d+)\.", name)
    entry = HUGGING_FACE_KEYS[re.sub(r"\.\d+\.", ".*.", name)]
    key = (entry if isinstance(entry, str) else entry[0]).replace("*", layer[1] if layer else "", 1)
    if "*" not in key:
        return {key: tensor.detach()}
    return {key.replace("*", str(e)): expert for e, expert in enumerate(tensor.detach())}


def as_hugging_face(model, config, folder):
    """transformers' model, loaded from a checkpoint written as the published ones are."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if not (config.tie_embeddings and name.startswith("lm_head")):
            tensors |= published(name, parameter)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    reference_config(config).save_pretrained(folder)
    reference, report = reference_class(config).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(report.values()), report
    return reference


@pytest.mark.parametrize(
    "config",
    [
        DENSE,
        dataclasses.replace(DENSE, tie_embeddings=True),
        EXPERTS,
        dataclasses.replace(EXPERTS, moe=dataclasses.replace(EXPERTS.moe, normalize_weights=False)),
    ],
    ids=["dense", "dense-tied", "experts", "experts-unnormalised"],
)
def test_logits_and_gradients_equal_those_of_transformers(config, filled, tmp_path):
    model = filled(config)
    reference = as_hugging_face(model, config, tmp_path)
    tokens = torch.randint(0, config.vocab_size, (2, 100), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(100).expand(2, 100)
    labels = tokens.roll(-1, 1)
    theirs = reference(tokens).logits
    ours = model(tokens, positions)
    assert theirs.std() > 0.1  # else a small difference would mean nothing
    assert (ours - theirs).abs().max() < 1e-4
    torch.nn.functional.cross_entropy(theirs.flatten(0, 1), labels.flatten()).backward()
    (model(tokens, positions, labels=labels) / labels.numel()).backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        fused = re.fullmatch(r"layers\.(\d)\.moe\.experts\.w([123])", name)
        if fused is None:
            ((key, _),) = published(name, parameter).items()
            gradient = expected.get(key, expected["model.embed_tokens.weight"])
        elif fused[2] == "2":
            gradient = expected[f"model.layers.{fused[1]}.mlp.experts.down_proj"]
        else:
            both = expected[f"model.layers.{fused[1]}.mlp.experts.gate_up_proj"]
            gradient = both.chunk(2, 1)[0 if fused[2] == "1" else 1]
        assert parameter.grad.norm() > 0, name
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


def test_normalised_queries_and_keys_change_the_logits(filled):
    tokens = torch.arange(20)[None]
    with_norm, without = (filled(DENSE, qk_norm=norm)(tokens, tokens) for norm in (True, False))
    assert (with_norm - without).abs().max() > 1e-2


PUBLISHED = {
    "0.6b": 596_049_920,
    "1.7b": 1_720_574_976,
    "4b": 4_022_468_096,
    "8b": 8_190_735_360,
    "14b": 14_768_307_200,
    "32b": 32_762_123_264,
    "30b-a3b": 30_532_122_624,
    "235b-a22b": 235_093_634_560,
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(preset):
    config = PRESETS[preset]
    assert parameter_count(config) == PUBLISHED[preset]
    with torch.device("meta"):
        model = config.build()
        reference = reference_class(config)._from_config(reference_config(config))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[preset]
    assert sum(p.numel() for p in reference.parameters()) == PUBLISHED[preset]


@pytest.mark.parametrize(("preset", "billions"), [("30b-a3b", 3.3), ("235b-a22b", 22)])
def test_as_many_parameters_are_active_as_the_names_say(preset, billions):
    assert active_parameter_count(PRESETS[preset]) == pytest.approx(billions * 1e9, rel=0.02)


@pytest.mark.parametrize("preset", ["debug", "debug-moe"])
def test_debug_presets_train(preset):
    config = PRESETS[preset]
    model = config.build()
    rules = config.init_rules()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind, value = rules[re.sub(r"\.\d+\.", ".*.", name)]
            parameter.fill_(value) if kind == "constant" else parameter.normal_(std=value, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    tokens = torch.arange(64)[None]
    losses = []
    for _ in range(6):
        loss = model(tokens, tokens, labels=tokens + 1) / 64
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
