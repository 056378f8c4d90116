import copy
import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from titan_models.moe import MoE
from titan_models.shape import MoEConfig

D = 16
CONFIG = MoEConfig(experts=6, top_k=3, hidden_dim=8, shared_hidden_dim=24)


def make(dtype=torch.float64, **changes):
    moe = MoE(D, dataclasses.replace(CONFIG, **changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return moe.to(dtype), torch.randn(2, 5, D, generator=generator).to(dtype).requires_grad_()


def token_by_token(moe, x):
    """The same layer, without sorting."""
    weights, chosen, _ = moe.router(x)
    rows = []
    for token, ws, es in zip(x.flatten(0, 1), weights.flatten(0, 1), chosen.flatten(0, 1), strict=True):
        out = torch.zeros_like(token) if moe.shared is None else moe.shared(token)
        for w, e in zip(ws, es, strict=True):
            inner = torch.nn.functional.silu(moe.experts.w1[e] @ token) * (moe.experts.w3[e] @ token)
            out = out + w * (moe.experts.w2[e] @ inner)
        rows.append(out)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("changes", [{}, {"top_k": 1}, {"shared_hidden_dim": 0}])
def test_every_token_gets_the_weighted_sum_of_its_experts(changes):
    results = []
    for way in (lambda moe, x: moe(x), token_by_token):
        moe, x = make(**changes)
        out = way(moe, x)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in moe.parameters())])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_no_token_is_dropped_when_all_choose_the_same_experts():
    moe, x = make(bias_update_rate=1.0)
    moe.router.bias[:3] = 100.0
    assert moe.router(x)[2].tolist() == [10, 10, 10, 0, 0, 0]
    torch.testing.assert_close(moe(x), token_by_token(moe, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_are_known_without_numbers(dtype):
    moe = MoE(D, dataclasses.replace(CONFIG, balance_loss=0.1)).to(dtype)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    for mode, moved in ((torch.device("meta"), copy.deepcopy(moe).to("meta")), (fake, moe)):
        with mode:
            x = torch.empty(2, 5, D, dtype=dtype, requires_grad=True)
            out = moved(x)
            (gradient,) = torch.autograd.grad(out.sum(), x)
        assert out.shape == gradient.shape == x.shape
        assert out.dtype == gradient.dtype == dtype


# torch 2.13's own compiler does what this warns of.
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compiled_and_recomputed_it_gives_the_same_gradients_and_counts_the_load_once():
    changes = {"balance_loss": 0.5, "z_loss": 0.1, "bias_update_rate": 0.1}
    row_weights = torch.tensor([0.5, 0.0], dtype=torch.float64)
    plain, x = make(**changes)
    plain(x, row_weights).square().sum().backward()
    moe, y = make(**changes)

    def recomputed(y, row_weights):
        return checkpoint(moe, y, row_weights, use_reentrant=False, preserve_rng_state=False)

    torch.compile(recomputed, backend="aot_eager", fullgraph=True)(y, row_weights).square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    for ours, expected in zip(moe.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)
    assert moe.router.load.sum() == 5 * 3
    assert torch.equal(moe.router.load, plain.router.load)
