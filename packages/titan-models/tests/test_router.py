"""Choices, weights, auxiliary losses and load of the router, each against its definition written down plainly."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from titan_models.router import Router
from titan_models.shape import MoEConfig

B, S, D, E, K = 3, 10, 12, 8, 2
ROW_WEIGHTS = torch.tensor([0.5, 0.3, 0.0], dtype=torch.float64)


def make(dtype=torch.float64, **changes):
    router = Router(D, MoEConfig(**{"experts": E, "top_k": K, "hidden_dim": 4} | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.gate.weight.copy_(torch.randn(E, D, generator=generator))
    return router.to(dtype), torch.randn(B, S, D, generator=generator, dtype=torch.float64).to(dtype)


def one_hot_counts(chosen):
    return torch.nn.functional.one_hot(chosen, E).flatten(1, 2).sum(1)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [False, True])
def test_weights_are_the_scores_of_the_best_experts(score, normalize):
    router, x = make(score=score, normalize_weights=normalize, route_scale=2.5)
    weights, chosen, counts = router(x)
    scores = getattr(torch, score)(x @ router.gate.weight.T, **({"dim": -1} if score == "softmax" else {}))
    best, index = scores.sort(-1, descending=True)
    assert torch.equal(chosen, index[..., :K])
    expected = best[..., :K] / (best[..., :K].sum(-1, keepdim=True) if normalize else 1)
    torch.testing.assert_close(weights, 2.5 * expected)
    assert torch.equal(counts, one_hot_counts(chosen).sum(0))


def test_sigmoids_too_small_for_a_number_make_no_nan():
    router, _ = make(torch.float32, score="sigmoid")
    with torch.no_grad():
        router.gate.weight.fill_(-100.0)
    weights, _, _ = router(torch.ones(1, 1, D))
    assert weights.isfinite().all()


def test_tokens_choose_within_their_best_groups():
    router, x = make(score="sigmoid", groups=4, top_groups=2, top_k=3, bias_update_rate=0.1)
    router.bias.copy_(torch.linspace(-1.8, -1.0, E))  # negative scores must not lose to what is left out
    _, chosen, _ = router(x)
    scores = (x @ router.gate.weight.T).sigmoid() + router.bias
    differs = 0
    for token, experts in zip(scores.flatten(0, 1).tolist(), chosen.flatten(0, 1).tolist(), strict=True):
        groups = sorted(range(4), key=lambda g: -(token[2 * g] + token[2 * g + 1]))[:2]
        allowed = [e for e in range(E) if e // 2 in groups]
        assert experts == sorted(allowed, key=lambda e: -token[e])[:3]
        differs += experts != sorted(range(E), key=lambda e: -token[e])[:3]
    assert differs


def test_the_bias_changes_the_choice_but_no_weight():
    router, x = make(bias_update_rate=0.1, normalize_weights=False)
    router.bias[5] = 10.0
    weights, chosen, _ = router(x)
    assert (chosen[..., 0] == 5).all()
    scores = (x @ router.gate.weight.T).softmax(-1)
    torch.testing.assert_close(weights, scores.gather(-1, chosen))


def test_a_step_moves_the_bias_towards_the_mean_load():
    router, _ = make(torch.float32, bias_update_rate=0.125)
    router.finish_step(torch.tensor([10, 0, 4, 5, 3, 4, 4, 2]))  # 4 on average
    assert router.bias.tolist() == [-0.125, 0.125, 0, -0.125, 0.125, 0, 0, 0.125]
    assert "bias" in router.state_dict()
    assert "load" not in router.state_dict()
    without, _ = make()
    without.finish_step(torch.arange(E))
    assert "bias" not in without.state_dict()


def test_a_cast_to_bfloat16_leaves_the_bias_and_the_load_exact():
    router, _ = make(torch.float32, bias_update_rate=1e-3)
    router.bias.fill_(1.001)
    router.load.fill_(2**24 + 1)
    router.to(torch.bfloat16)
    assert router.gate.weight.dtype == torch.bfloat16
    assert router.bias.dtype == torch.float32
    assert (router.bias == torch.tensor(1.001)).all()
    assert (router.load == 2**24 + 1).all()
    assert router.to(torch.float64).bias.dtype == torch.float64


def test_logits_of_a_bfloat16_model_are_computed_in_float32():
    router, x = make(torch.bfloat16, normalize_weights=False)
    weights, chosen, _ = router(x)
    exact = (x.float() @ router.gate.weight.float().T).softmax(-1)
    torch.testing.assert_close(weights, exact.gather(-1, chosen))


def plain_losses(router, x, row_weights):
    """The auxiliary losses as they are written in the papers, for autograd to differentiate."""
    config = router.config
    logits = x @ router.gate.weight.T
    scores = logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()
    share = scores / scores.sum(-1, keepdim=True)
    total = 0.0
    for b in range(x.shape[0]):
        chosen = share[b].topk(K).indices
        frequency = torch.stack([(chosen == e).sum() * E / (K * x.shape[1]) for e in range(E)])
        balance = (frequency * share[b].mean(0)).sum()
        z = logits[b].exp().sum(-1).log().square().mean()
        total = total + row_weights[b] * (config.balance_loss * balance + config.z_loss * z)
    return total


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("balance", "z"), [(0.7, 0.0), (0.0, 0.3), (0.7, 0.3)])
@pytest.mark.parametrize("row_weights", [None, ROW_WEIGHTS])
def test_gradients_are_those_of_the_auxiliary_losses_whatever_divides_the_main_loss(score, balance, z, row_weights):
    router, x = make(score=score, balance_loss=balance, z_loss=z)
    x.requires_grad_()
    target = torch.randn(B, S, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def main(router):
        return (router(x, row_weights)[0] * target).sum() / 100

    main(router).backward()
    ours = x.grad, router.gate.weight.grad
    plain = copy.deepcopy(router).eval()  # adds no auxiliary gradient
    x.grad = plain.gate.weight.grad = None
    shares = torch.full((B,), 1 / B, dtype=torch.float64) if row_weights is None else row_weights
    (main(plain) + plain_losses(plain, x, shares)).backward()
    for mine, expected in zip(ours, (x.grad, plain.gate.weight.grad), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-14)


def test_a_part_of_the_sequence_uses_the_counts_of_whole_rows():
    router, x = make(balance_loss=0.7, z_loss=0.3)
    router(x, ROW_WEIGHTS)[0].sum().backward()
    whole, load = router.gate.weight.grad, router.load.clone()
    router.gate.weight.grad = None
    router.load.zero_()
    parts = x.split([3, 7], 1)
    counts = [one_hot_counts(router(part)[1]) for part in parts]
    for part, elsewhere in zip(parts, reversed(counts), strict=True):
        router.sum_over_sequence = elsewhere.__radd__ if part is parts[0] else lambda c, other=elsewhere: c.add_(other)
        weights, chosen, tokens = router(part, ROW_WEIGHTS)
        assert torch.equal(tokens, one_hot_counts(chosen).sum(0))  # the experts here get the tokens here
        weights.sum().backward()
    torch.testing.assert_close(router.gate.weight.grad, whole, rtol=1e-10, atol=1e-14)
    assert torch.equal(router.load, load)  # each part counts its own tokens only


@pytest.mark.parametrize("losses", [{}, {"balance_loss": 0.1}])
def test_load_counts_each_token_of_rows_with_weight_once(losses):
    router, x = make(**losses)
    expected = one_hot_counts(router(x)[1])
    router.load.zero_()
    (recomputed,) = (checkpoint(router, x.requires_grad_(), ROW_WEIGHTS, use_reentrant=False)[0],)
    other = router(x)[0]  # a second micro-batch before the first one's backward, as in a pipeline
    assert router.load.sum() == 0
    recomputed.sum().backward()
    assert torch.equal(router.load, expected[:2].sum(0))
    other.sum().backward()
    assert torch.equal(router.load, expected[:2].sum(0) + expected.sum(0))


def test_nothing_is_counted_outside_of_training():
    router, x = make(balance_loss=0.1)
    with torch.no_grad():
        router(x)
    router.eval()(x)[0].sum().backward()
    assert router.load.sum() == 0
