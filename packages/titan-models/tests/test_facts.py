import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from titan_models.facts import flops_per_token, parameter_shapes, training_flops_per_token


@pytest.mark.parametrize("tied", [False, True])
def test_shapes_equal_those_of_the_built_model(tiny, tied):
    config = dataclasses.replace(tiny, tie_embeddings=tied)
    with torch.device("meta"):
        model = config.build()
    assert parameter_shapes(config) == {name: tuple(p.shape) for name, p in model.named_parameters()}


def attention_flops(q, k, v, *args, out_shape, **kwargs):
    """PyTorch's counter does not know the CPU attention kernel: two products over all pairs, full attention."""
    batch, heads, queries, dim = q
    return 2 * 2 * batch * heads * queries * k[2] * dim


@pytest.mark.parametrize("tied", [False, True])
def test_flops_equal_those_counted_on_the_model(tiny, filled, tied):
    config = dataclasses.replace(tiny, tie_embeddings=tied)
    length = 64
    model = filled(config)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: attention_flops}) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.int64), torch.arange(length)[None])
    counted = counter.get_total_flops() / length
    assert sum(flops_per_token(config, length, causal=False).values()) == pytest.approx(counted, rel=5e-3)


def test_causal_attention_counts_the_tokens_that_are_seen(tiny):
    causal, full = (flops_per_token(tiny, 3, causal=c)["layers.0.attention.sdpa"] for c in (True, False))
    assert causal / full == (1 + 2 + 3) / 9


def test_training_is_three_times_forward(tiny):
    assert training_flops_per_token(tiny, 64) == 3 * sum(flops_per_token(tiny, 64).values())
