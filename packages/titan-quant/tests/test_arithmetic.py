from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from ranks import run_ranks
from titan_quant.arithmetic import Arithmetic, Sharing, linear
from titan_quant.bounds import product_bound
from titan_quant.recipes import OPERANDS, RECIPES

NAMES = [name for name in RECIPES if name != "none"]
SHAPES = {"whole blocks": (64, 96, 128), "parts of blocks": (33, 40, 72), "few tokens": (1, 32, 48)}


def operands(shape, *, kind="normal", dtype=torch.float32):
    """Input [T, K], weight [N, K] and gradient of the output [T, N]."""
    T, K, N = shape
    generator = torch.Generator().manual_seed(T)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    x, weight, grad = draw(T, K), draw(N, K) * 0.02, draw(T, N) * 1e-5
    if kind == "outliers":
        x[:, 3] *= 300
        x[0] *= 50
        weight[5] *= 100
        grad[:, 7] *= 1e4
        grad[-1] *= float(T == 1)  # a token without a gradient
    return [t.to(dtype) for t in (x, weight, grad)]


def products(x, weight, grad, arithmetic, weight_amax=None):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear(x, weight, arithmetic, weight_amax)
    out.backward(grad)
    return {"output": out.detach(), "grad_input": x.grad, "grad_weight": weight.grad}


def as_products(x, weight, grad):
    """Both operands of each product, with what is summed over in the last dimension."""
    return {"output": (x, weight), "grad_input": (grad, weight.T), "grad_weight": (grad.T, x.T)}


@pytest.mark.parametrize("kind", ["normal", "outliers"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("name", NAMES)
def test_all_three_products_stay_within_the_bound_of_their_formats(name, shape, kind):
    inputs = operands(shape, kind=kind)
    recipe = RECIPES[name]
    computed = products(*inputs, Arithmetic(recipe, emulate=True))
    for product, (a, b) in as_products(*inputs).items():
        error = (computed[product].double() - a.double() @ b.double().T).abs()
        bound = product_bound(a, b, recipe.casts(product))
        assert (error <= bound).all(), product
        if recipe.casts(product) is None:
            continue
        # It is rounded, and by no coarser format than the one that the bound is of.
        exact = product_bound(a, b, None)
        assert (error > exact).any(), product
        if kind == "normal":
            assert (error / bound).max() > 0.02, product


@pytest.mark.parametrize("rounding", ["floor", "ceil", "even"])
def test_every_way_to_round_mx_scales_stays_within_its_bound(rounding):
    inputs = operands((64, 64, 32), kind="outliers")
    recipe = RECIPES["mxfp8"].with_rounding(rounding)
    computed = products(*inputs, Arithmetic(recipe, emulate=True))
    other = products(*inputs, Arithmetic(RECIPES["mxfp8"], emulate=True))
    for product, (a, b) in as_products(*inputs).items():
        error = (computed[product].double() - a.double() @ b.double().T).abs()
        assert (error <= product_bound(a, b, recipe.casts(product))).all()
        assert not torch.equal(computed[product], other[product])


def test_an_outlier_costs_its_own_row_only_where_rows_have_scales():
    x, weight, grad = operands((16, 64, 32))
    loud = x.clone()
    loud[0, 0] = 1e5
    for name, alike in (("float8_rowwise", True), ("mxfp8", True), ("float8_tensorwise", False)):
        outputs = [
            products(each, weight, grad, Arithmetic(RECIPES[name], emulate=True))["output"] for each in (x, loud)
        ]
        assert torch.equal(outputs[0][1:], outputs[1][1:]) == alike


@pytest.mark.parametrize("name", NAMES)
def test_results_have_the_dtype_and_shape_of_a_linear_layers(name):
    x, weight, grad = operands((24, 64, 32), dtype=torch.bfloat16)
    computed = products(x.view(2, 3, 4, 64), weight, grad.view(2, 3, 4, 32), Arithmetic(RECIPES[name], emulate=True))
    assert computed["output"].shape == (2, 3, 4, 32)
    assert computed["grad_input"].shape == (2, 3, 4, 64)
    assert {t.dtype for t in computed.values()} == {torch.bfloat16}
    one = linear(x[0], weight, Arithmetic(RECIPES[name], emulate=True))
    assert one.shape == (32,)


def test_float64_is_summed_in_float64():
    """Parts of whole blocks, each summed on its own, add up to the whole."""
    x, weight, grad = (t.double() for t in operands((8, 512, 32)))
    arithmetic = Arithmetic(RECIPES["mxfp8"], emulate=True)
    whole = products(x, weight, grad, arithmetic)["output"]
    parts = zip(x.chunk(4, 1), weight.chunk(4, 1), strict=True)
    together = sum(products(a, b, grad, arithmetic)["output"] for a, b in parts)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(together, whole, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_are_no_error(name):
    x, weight, grad = operands((4, 64, 32))
    computed = products(x[:0], weight, grad[:0], Arithmetic(RECIPES[name], emulate=True))
    assert computed["output"].shape == (0, 32)
    assert computed["grad_weight"].count_nonzero() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_a_divergence_is_not_hidden(name, value):
    x, weight, grad = operands((8, 64, 32))
    for i, product in enumerate(("output", "output", "grad_input")):
        inputs = [x, weight, grad]
        inputs[i] = inputs[i].clone()
        inputs[i][2, 3] = value
        assert not products(*inputs, Arithmetic(RECIPES[name], emulate=True))[product].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_what_needs_no_gradient_gets_none(name):
    x, weight, grad = operands((8, 64, 32))
    out = linear(x.requires_grad_(), weight, Arithmetic(RECIPES[name], emulate=True))
    out.backward(grad)
    assert x.grad is not None
    assert weight.grad is None
    trained = weight.clone().requires_grad_()
    linear(x.detach(), trained, Arithmetic(RECIPES[name], emulate=True)).backward(grad)
    assert trained.grad is not None


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracer does that itself
@pytest.mark.parametrize("name", NAMES)
def test_a_compiler_sees_one_graph_and_recomputation_changes_nothing(name):
    inputs = operands((33, 64, 48))
    arithmetic = Arithmetic(RECIPES[name], emulate=True)
    eager = products(*inputs, arithmetic)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    x, weight, grad = inputs
    for function in (compiled, lambda *args: checkpoint(linear, *args, use_reentrant=False)):
        ours, own = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = function(ours, own, arithmetic)
        out.backward(grad)
        for got, expected in zip((out, ours.grad, own.grad), eager.values(), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, of torch
@pytest.mark.parametrize("name", NAMES)
def test_inductors_code_computes_the_same(name):
    x, weight, grad = operands((33, 64, 48))
    arithmetic = Arithmetic(RECIPES[name], emulate=True)
    eager = products(x, weight, grad, arithmetic)
    ours, own = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = torch.compile(linear, fullgraph=True)(ours, own, arithmetic)
    out.backward(grad)
    for got, expected in zip((out, ours.grad, own.grad), eager.values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_autocast_does_not_reach_into_the_products():
    inputs = operands((8, 64, 32))
    arithmetic = Arithmetic(RECIPES["float8_rowwise"], emulate=True)
    plain = products(*inputs, arithmetic)
    with torch.autocast("cpu", torch.bfloat16):
        under = products(*inputs, arithmetic)
    assert all(torch.equal(under[product], plain[product]) for product in plain)


def test_a_known_largest_magnitude_of_the_weight_is_used_in_both_its_products():
    inputs = operands((8, 64, 32))
    arithmetic = Arithmetic(RECIPES["float8_tensorwise"], emulate=True)
    amax = inputs[1].abs().max()
    plain, known, other = (products(*inputs, arithmetic, given) for given in (None, amax, amax * 1.3))
    for product in ("output", "grad_input", "grad_weight"):
        assert torch.equal(plain[product], known[product])
        assert torch.equal(plain[product], other[product]) == (product == "grad_weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_float8_is_what_torchao_emulates(torchao, name, dtype):
    inputs = operands((48, 64, 32), kind="outliers", dtype=dtype)
    config = replace(torchao.float8.Float8LinearConfig.from_recipe_name(name), emulate=True)
    layer = torch.nn.Linear(64, 32, bias=False, dtype=dtype)
    layer.weight.data = inputs[1].clone()
    layer = torchao.float8.float8_linear.Float8Linear.from_float(layer, config)
    x = inputs[0].clone().requires_grad_()
    out = layer(x)
    out.backward(inputs[2])
    ours = products(*inputs, Arithmetic(RECIPES[f"float8_{name}"], emulate=True))
    for got, theirs in zip(ours.values(), (out, x.grad, layer.weight.grad), strict=True):
        # They divide by the scales where we multiply by their inverse: float32's last bit, where one is no power of 2.
        rtol = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(got, theirs, rtol=rtol, atol=1e-6 * theirs.abs().max().item())


@pytest.mark.parametrize("rounding", ["floor", "rceil"])
def test_mxfp8_is_what_torchao_emulates(torchao, rounding):
    """They multiply the rounded numbers, which bfloat16 can hold, in bfloat16."""
    inputs = operands((64, 96, 32), kind="outliers", dtype=torch.bfloat16)
    x, weight = (t.clone().requires_grad_() for t in inputs[:2])
    mode = torchao.prototype.mx_formats.config.ScaleCalculationMode(rounding)
    emulated = torchao.prototype.moe_training.mxfp8_linear.KernelPreference.EMULATED
    mm = torchao.prototype.moe_training.mxfp8_linear._to_mxfp8_then_scaled_mm
    out = mm(x, weight, kernel_preference=emulated, scale_calculation_mode=mode)
    out.backward(inputs[2])
    ours = products(*inputs, Arithmetic(RECIPES["mxfp8"].with_rounding(rounding), emulate=True))
    for got, theirs in zip(ours.values(), (out, x.grad, weight.grad), strict=True):
        torch.testing.assert_close(got, theirs, rtol=2**-7, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("cut", ["colwise", "rowwise"])
@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_layer_share_their_scales(name, cut):
    """Two ranks, each with half of the output or input features, compute what one with all of them does.

    The halves differ in size, so that scales of their own would keep more of the smaller one.
    """
    x, weight, grad = operands((32, 128, 64))
    if cut == "colwise":
        grad[:, 32:] *= 2.0**-14
        weight[32:] *= 2.0**14
    else:
        x[:, 64:] *= 2.0**-14
        weight[:, 64:] *= 2.0**14
    whole = products(x, weight, grad, Arithmetic(RECIPES[name], emulate=True))
    operand = "gradient" if cut == "colwise" else "activation"

    def part(sharing):
        me = dist.get_rank()
        arithmetic = Arithmetic(RECIPES[name], emulate=True, sharing=sharing)
        if cut == "colwise":
            return products(x, weight.chunk(2)[me], grad.chunk(2, 1)[me], arithmetic)
        return products(x.chunk(2, 1)[me], weight.chunk(2, 1)[me], grad, arithmetic)

    def rank():
        return part(Sharing(dist.group.WORLD, ("weight", operand))), part(None)

    def together(parts):
        if cut == "colwise":
            columns, rows = ("output",), ("grad_weight",)
        else:
            columns, rows = ("grad_input", "grad_weight"), ()
        joined = {product: torch.cat([part[product] for part in parts], 1) for product in columns}
        joined |= {product: torch.cat([part[product] for part in parts]) for product in rows}
        return joined | {p: sum(part[p] for part in parts) for p in whole if p not in joined}

    shared, alone = map(together, zip(*run_ranks(2, rank), strict=True))
    changed = []
    for product, expected in whole.items():
        torch.testing.assert_close(shared[product], expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
        error = (alone[product] - expected).abs().max() / expected.abs().max()
        changed += [product] if error > 1e-4 else []
    if name == "mxfp8":
        assert not changed  # blocks are not cut
    elif name.startswith("float8_rowwise"):
        assert changed == ["grad_input" if cut == "colwise" else "output"]
    else:
        assert changed


def test_operands_of_each_product_are_named_in_order():
    assert [operands[0] for operands in OPERANDS.values()] == ["activation", "gradient", "gradient"]
