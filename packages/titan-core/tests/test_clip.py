import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ranks import run_ranks
from titan_core.clip import clip_gradients, gradient_norm


def parameters(*gradients):
    made = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient.clone()
        made.append(parameter)
    return made


def test_norm_and_clipping():
    params = parameters(torch.tensor([3.0, 0.0]), torch.tensor([[4.0]]))
    assert clip_gradients(params, 1.0) == 5.0
    assert gradient_norm(params).item() == pytest.approx(1.0, abs=1e-6)
    assert params[0].grad[0].item() == pytest.approx(0.6, abs=1e-6)


def test_small_gradients_and_a_limit_of_zero_change_nothing():
    for limit, gradient in ((10.0, torch.tensor([3.0, 4.0])), (0.0, torch.tensor([300.0, 400.0]))):
        params = parameters(gradient)
        clip_gradients(params, limit)
        assert torch.equal(params[0].grad, gradient)


def test_low_precision_gradients_are_summed_in_float32():
    params = parameters(torch.full((100_000,), 0.01, dtype=torch.bfloat16))
    norm = gradient_norm(params)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(math.sqrt(100_000) * params[0].grad[0].item(), rel=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 1e-1])
def test_a_matrix_with_few_large_rows_has_one_norm_however_it_is_cut(scale):
    """As an embedding's gradient is whose corpus uses few of its tokens."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(4096, 256, generator=generator) * scale
    gradient[:309] = torch.randn(309, 256, generator=generator)
    expected = gradient.double().norm().item()
    for pieces in (1, 2, 4):
        for dim in (0, 1):
            norm = gradient_norm(parameters(*gradient.chunk(pieces, dim))).item()
            assert norm == pytest.approx(expected, rel=2e-7)


def test_scalars_and_empty_shards_have_norms_too():
    params = parameters(torch.tensor(3.0), torch.empty(0, 5), torch.tensor([4.0]))
    assert gradient_norm(params).item() == 5.0


def test_each_element_counts_once_however_it_is_laid_out():
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(8, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = torch.stack([a, b, c]).norm()

    def run():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        placed = (
            distribute_tensor(a, mesh, [Replicate(), Shard(0)]),
            distribute_tensor(b, mesh, [Shard(0), Shard(1)]),
            c,
        )
        params = parameters(*placed)
        norm = clip_gradients(params, 1.0)
        return norm.item(), gradient_norm(params).item()

    for norm, clipped in run_ranks(4, run):
        assert norm == pytest.approx(expected.item(), rel=1e-14)
        assert clipped == pytest.approx(1.0, abs=1e-6)
