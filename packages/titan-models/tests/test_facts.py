import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from titan_models.facts import (
    active_parameter_count,
    flops_per_token,
    parameter_count,
    parameter_shapes,
    training_flops_per_token,
)
from titan_models.families import llama3, qwen3
from titan_models.shape import MoEConfig

EXPERTS = MoEConfig(experts=8, top_k=3, hidden_dim=40, shared_hidden_dim=16, first_dense_layers=1)
CHANGES = [{}, {"tie_embeddings": True}, {"qk_norm": True, "moe": EXPERTS}]


@pytest.mark.parametrize("changes", CHANGES)
def test_shapes_equal_those_of_the_built_model(tiny, changes):
    config = dataclasses.replace(tiny, **changes)
    with torch.device("meta"):
        model = config.build()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert list(parameter_shapes(config).items()) == list(shapes.items())


def test_parameters_of_other_experts_are_not_active(tiny):
    assert active_parameter_count(tiny) == parameter_count(tiny)
    config = dataclasses.replace(tiny, moe=EXPERTS)
    one_expert = 3 * config.dim * EXPERTS.hidden_dim
    assert parameter_count(config) - active_parameter_count(config) == (8 - 3) * one_expert  # in one of two layers


def attention_flops(q, k, v, *args, out_shape, **kwargs):
    """PyTorch's counter does not know the CPU attention kernel: two products over all pairs, full attention."""
    batch, heads, queries, dim = q
    return 2 * 2 * batch * heads * queries * k[2] * dim


def expert_flops(x, weight, counts, *args, out_shape, **kwargs):
    """Nor the products of experts: one row of a weight for each row of the input."""
    return 2 * x[0] * weight[1] * weight[2]


def weighted_sum_flops(*args, **kwargs):
    """The sum of experts' outputs is left out, as other elementwise work is."""
    return 0


@pytest.mark.parametrize("changes", CHANGES)
def test_flops_equal_those_counted_on_the_model(tiny, filled, changes):
    config = dataclasses.replace(tiny, **changes)
    length = 64
    model = filled(config)
    formulas = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        torch.ops.titan_models.expert_products: expert_flops,
        torch.ops.aten.bmm: weighted_sum_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.int64), torch.arange(length)[None])
    counted = counter.get_total_flops() / length
    assert sum(flops_per_token(config, length, causal=False).values()) == counted


def test_flops_are_told_by_module(tiny):
    config = dataclasses.replace(tiny, moe=EXPERTS)
    with torch.device("meta"):
        modules = dict(config.build().named_modules())
    flops = flops_per_token(config, 64)
    assert set(flops) <= set(modules)
    assert flops["layers.1.moe.experts"] == 3 * (2 * 3 * config.dim * EXPERTS.hidden_dim)


def test_causal_attention_counts_the_tokens_that_are_seen(tiny):
    causal, full = (flops_per_token(tiny, 3, causal=c)["layers.0.attention.sdpa"] for c in (True, False))
    assert causal / full == (1 + 2 + 3) / 9


def test_training_is_three_times_forward(tiny):
    assert training_flops_per_token(tiny, 64) == 3 * sum(flops_per_token(tiny, 64).values())


def test_documents_confine_what_a_token_sees(tiny):
    """Two documents of 5 and 11 tokens in a row cost what they cost alone."""
    positions = torch.cat([torch.arange(5), torch.arange(11)])
    packed = training_flops_per_token(tiny, 16, seen=(positions + 1).double().mean().item())
    alone = (5 * training_flops_per_token(tiny, 5) + 11 * training_flops_per_token(tiny, 11)) / 16
    assert packed == pytest.approx(alone)
    assert packed < training_flops_per_token(tiny, 16)


@pytest.mark.parametrize("family", [llama3, qwen3])
def test_flops_of_published_sizes_equal_those_counted_on_them(family):
    """On the meta device: two blocks of each model, in their true widths."""
    for name, preset in family.PRESETS.items():
        config = dataclasses.replace(preset, layers=min(preset.layers, 2))
        with torch.device("meta"):
            model = config.build()
            tokens, positions = torch.zeros(1, 128, dtype=torch.int64), torch.arange(128)[None]
        # Meta tensors attend by two batched products, as the sum of experts' outputs is one: neither is counted here.
        formulas = {torch.ops.titan_models.expert_products: expert_flops, torch.ops.aten.bmm: weighted_sum_flops}
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter, torch.no_grad():
            model(tokens, positions)
        expected = flops_per_token(config, 128, seen=0.0)
        assert sum(expected.values()) == counter.get_total_flops() / 128, name
