import pytest
import torch

from titan_models.experts import Experts, expert_products, expert_weight_gradients
from titan_models.feed_forward import FeedForward

D, F, E = 16, 24, 5
COUNTS = torch.tensor([0, 7, 1, 0, 12])


def make(grouped_mm, dtype=torch.float32, dim=D, hidden=F):
    experts = Experts(dim, hidden, E, grouped_mm)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(20, dim, generator=generator).to(dtype).requires_grad_()
    return experts.to(dtype), x, torch.randn(20, dim, generator=generator).to(dtype)


def run(experts, x, grad, counts=COUNTS):
    out = experts(x, counts)
    x.grad = None
    out.backward(grad)
    return [out.detach(), x.grad, *(p.grad for p in experts.parameters())]


def test_each_expert_is_a_feed_forward_layer_for_its_own_rows():
    experts, x, grad = make("loop", torch.float64)
    ours = run(experts, x, grad)
    plain = x.detach().clone().requires_grad_()
    layers, outs = [], []
    for e, rows in enumerate(plain.split(COUNTS.tolist())):
        layer = FeedForward(D, F).double()
        layer.load_state_dict({f"{name}.weight": w[e].detach() for name, w in experts.named_parameters()})
        layers.append(layer)
        outs.append(layer(rows))
    torch.cat(outs).backward(grad)
    weights = [torch.stack([getattr(layer, n).weight.grad for layer in layers]) for n in ("w1", "w3", "w2")]
    for mine, expected in zip(ours, [torch.cat(outs), plain.grad, *weights], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("counts", [COUNTS, torch.tensor([20, 0, 0, 0, 0]), torch.tensor([4, 4, 4, 4, 4])])
def test_grouped_and_loop_give_equal_results(dtype, tolerance, counts):
    for one, other in zip(
        run(*make("grouped", dtype), counts=counts), run(*make("loop", dtype), counts=counts), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_a_part_of_the_experts_works_as_it_is():
    experts, x, _ = make("auto", torch.float64)
    whole = experts(x, COUNTS)
    for name, weight in list(experts.named_parameters()):
        setattr(experts, name, torch.nn.Parameter(weight[3:].detach()))
    torch.testing.assert_close(experts(x[8:], COUNTS[3:]), whole[8:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_token_at_all_gives_zero_gradients(dtype):
    experts, x, grad = make("auto", dtype)
    x, grad = x.detach()[:0].requires_grad_(), grad[:0]
    out, _, *weights = run(experts, x, grad, counts=torch.zeros(E, dtype=torch.int64))
    assert out.shape == (0, D)
    assert all(not gradient.any() for gradient in weights)


def kernels(experts, x):
    with torch.profiler.profile() as profile:
        experts(x, COUNTS)
    return {event.key for event in profile.key_averages()}


def test_auto_uses_the_grouped_kernel_where_there_is_one():
    experts, x, _ = make("auto", torch.bfloat16)
    assert "aten::_grouped_mm" in kernels(experts, x)
    for dtype, hidden in ((torch.float32, F), (torch.float64, F), (torch.bfloat16, F + 1)):
        experts, x, grad = make("auto", dtype, hidden=hidden)
        assert "titan_models::expert_products" in kernels(experts, x)
        run(experts, x, grad)


@pytest.mark.parametrize(("dtype", "hidden"), [(torch.float64, F), (torch.bfloat16, F + 1)])
def test_grouped_is_refused_where_torch_cannot(dtype, hidden):
    experts, x, _ = make("grouped", dtype, hidden=hidden)
    with pytest.raises(ValueError, match=r"model\.moe\.grouped_mm is 'grouped'.*Use 'auto' or 'loop'"):
        experts(x, COUNTS)


def test_the_operators_are_sound():
    x, weight = torch.randn(20, D, requires_grad=True), torch.randn(E, F, D, requires_grad=True)
    torch.library.opcheck(expert_products, (x, weight, COUNTS))
    torch.library.opcheck(expert_weight_gradients, (torch.randn(20, F), torch.randn(20, D), COUNTS))
