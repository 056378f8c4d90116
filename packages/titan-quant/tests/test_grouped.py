import pytest
import torch
from torch import nn

from titan_quant.arithmetic import Arithmetic, linear
from titan_quant.bounds import product_bound
from titan_quant.grouped import FilledGroups, LowPrecisionProduct, group_of_rows
from titan_quant.recipes import RECIPES

NAMES = [name for name, recipe in RECIPES.items() if recipe.experts]
COUNTS = [[16, 32, 16], [5, 0, 33, 26], [0, 0, 1], [64]]


def operands(rows, experts, *, extra=0):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows + extra, 64, generator=generator)
    x[:, 3] *= 100
    weight = torch.randn(experts, 96, 64, generator=generator) * 0.1
    return x, weight, torch.randn(rows + extra, 96, generator=generator)


def products(x, weight, grad, counts, arithmetic, function=None):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = (function or LowPrecisionProduct(arithmetic))(x, weight, counts)
    rows = int(counts.sum())
    out[:rows].backward(grad[:rows])
    return out.detach()[:rows], x.grad[:rows], weight.grad


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("name", NAMES)
def test_each_expert_computes_what_a_linear_layer_does(name, counts):
    """Its scales, those along tokens too, know nothing of the other experts' rows."""
    x, weight, grad = operands(sum(counts), len(counts))
    arithmetic = Arithmetic(RECIPES[name], emulate=True)
    out, grad_x, grad_weight = products(x, weight, grad, torch.tensor(counts), arithmetic)
    start = 0
    for expert, count in enumerate(counts):
        rows = slice(start, start + count)
        own, mine = x[rows].clone().requires_grad_(), weight[expert].clone().requires_grad_()
        alone = linear(own, mine, arithmetic)
        alone.backward(grad[rows])
        for got, expected in ((out[rows], alone), (grad_x[rows], own.grad), (grad_weight[expert], mine.grad)):
            torch.testing.assert_close(got, expected.detach(), rtol=1e-6, atol=1e-6)
        start += count


@pytest.mark.parametrize("name", NAMES)
def test_results_stay_within_the_bound_of_the_formats(name):
    counts = [5, 0, 33, 26]
    x, weight, grad = operands(64, 4)
    recipe = RECIPES[name]
    out, grad_x, grad_weight = products(x, weight, grad, torch.tensor(counts), Arithmetic(recipe, emulate=True))
    start = 0
    for expert, count in enumerate(counts):
        rows = slice(start, start + count)
        start += count
        if not count:
            assert grad_weight[expert].count_nonzero() == 0
            continue
        for product, got, a, b in (
            ("output", out[rows], x[rows], weight[expert]),
            ("grad_input", grad_x[rows], grad[rows], weight[expert].T),
            ("grad_weight", grad_weight[expert], grad[rows].T, x[rows].T),
        ):
            error = (got.double() - a.double() @ b.double().T).abs()
            assert (error <= product_bound(a, b, recipe.casts(product))).all()


@pytest.mark.parametrize("name", NAMES)
def test_rows_behind_all_groups_change_nothing(name):
    counts = torch.tensor([7, 20, 13])
    arithmetic = Arithmetic(RECIPES[name], emulate=True)
    x, weight, grad = operands(40, 3, extra=24)
    plain = products(x[:40], weight, grad[:40], counts, arithmetic)
    x[40:] = 1e6
    for got, expected in zip(products(x, weight, grad, counts, arithmetic), plain, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("multiple", [1, 16, 32])
@pytest.mark.parametrize("counts", COUNTS)
def test_filled_groups_start_at_multiples_and_give_every_row_back(counts, multiple):
    rows = sum(counts) + 3
    filled = FilledGroups(torch.tensor(counts), rows, multiple)
    x = torch.arange(1.0, rows + 1)[:, None].expand(rows, 2)
    full = filled.fill(x)
    assert full.shape[0] % multiple == 0
    assert torch.equal(filled.take(full), x)
    assert filled.ends.dtype == torch.int32
    start = first = 0
    for end, count in zip(filled.ends.tolist(), counts, strict=True):
        assert (end - start) % multiple == 0
        assert full[start:end, 0].tolist() == list(range(first + 1, first + count + 1)) + [0.0] * (end - start - count)
        start, first = end, first + count
    assert full.shape[0] == FilledGroups(torch.tensor([rows] + [0] * (len(counts) - 1)), rows, multiple).rows


def test_rows_know_their_group():
    assert group_of_rows(torch.tensor([2, 0, 1]), 5).tolist() == [0, 0, 2, 3, 3]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_compiler_sees_one_graph(name):
    counts = torch.tensor([5, 0, 33, 26])
    arithmetic = Arithmetic(RECIPES[name], emulate=True)
    inputs = operands(64, 4)
    compiled = torch.compile(LowPrecisionProduct(arithmetic), fullgraph=True, backend="aot_eager")
    eager = products(*inputs, counts, arithmetic)
    for got, expected in zip(products(*inputs, counts, arithmetic, compiled), eager, strict=True):
        assert torch.equal(got, expected)


def test_mxfp8_is_what_torchao_emulates(torchao):
    counts = torch.tensor([5, 0, 33, 26])
    inputs = [t.bfloat16() for t in operands(64, 4)]
    ours = products(*inputs, counts, Arithmetic(RECIPES["mxfp8"], emulate=True))
    module = torchao.prototype.moe_training.mxfp8_grouped_mm

    def theirs(x, weight, counts):
        return module._to_mxfp8_then_scaled_grouped_mm(
            x,
            weight.transpose(1, 2),
            counts.cumsum(0).int(),
            kernel_preference=module.KernelPreference.EMULATED,
            pad_token_groups_for_grouped_mm=True,
        )

    for got, expected in zip(ours, products(*inputs, counts, None, theirs), strict=True):
        torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-8 * expected.abs().max().item())


class Experts(nn.Module):
    """A stranger's experts, with the door."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 64, 32))
        self.down = nn.Parameter(torch.randn(3, 32, 64))

    def grouped_product(self, x, weight, counts):
        return torch.cat([rows @ own.T for rows, own in zip(x.split(counts.tolist()), weight, strict=True)])

    def forward(self, x, counts):
        return self.grouped_product(self.grouped_product(x, self.up, counts).relu(), self.down, counts)


def test_a_modules_products_are_replaced_through_its_door():
    experts = Experts()
    x, counts = torch.randn(12, 32), torch.tensor([4, 0, 8])
    plain = experts(x, counts)
    names = list(experts.state_dict())
    experts.grouped_product = LowPrecisionProduct(Arithmetic(RECIPES["mxfp8"], emulate=True))
    out = experts(x, counts)
    assert not torch.equal(out, plain)
    torch.testing.assert_close(out, plain, rtol=0.2, atol=0.1 * plain.abs().max().item())
    assert list(experts.state_dict()) == names
