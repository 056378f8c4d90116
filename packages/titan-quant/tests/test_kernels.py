import pytest
import torch

from titan_quant.arithmetic import Arithmetic, emulated_product, linear
from titan_quant.bounds import product_bound
from titan_quant.device import nvidia_capability
from titan_quant.formats import quantize
from titan_quant.grouped import LowPrecisionProduct
from titan_quant.kernels import scaled_product
from titan_quant.recipes import RECIPES

FLOAT8 = ["float8_tensorwise", "float8_rowwise", "float8_rowwise_with_gw_hp"]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 64, 48), (5, 33, 7)])
@pytest.mark.parametrize("product", ["output", "grad_input"])
@pytest.mark.parametrize("name", FLOAT8)
def test_torchs_float8_product_is_the_emulated_one(name, product, shape, dtype, fast):
    """torch has `scaled_mm` for CPUs too, so that all that is around the kernel runs here."""
    R, C, S = shape
    casts = RECIPES[name].casts(product)
    a, b = quantize(torch.randn(R, C) * 3, casts[0]), quantize(torch.randn(S, C), casts[1])
    out = scaled_product(a, b, dtype, fast=fast)
    assert out.dtype == dtype
    rtol = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(out, emulated_product(a, b, dtype), rtol=rtol, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", FLOAT8)
def test_a_layer_computes_the_same_with_torchs_product_and_can_be_compiled(name):
    x, weight, grad = torch.randn(33, 64), torch.randn(48, 64), torch.randn(33, 48)
    results = []
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for function, emulate in ((linear, True), (linear, False), (compiled, False)):
        ours, own = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = function(ours, own, Arithmetic(RECIPES[name], emulate))
        out.backward(grad)
        results.append((out.detach(), ours.grad, own.grad))
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "none"])
def test_the_hardware_stays_within_the_bound(name):
    """The bound of the formats, and that of bfloat16 results; Hopper's fast sums keep 14 bits, of at most 128 terms."""
    recipe = RECIPES[name]
    if recipe.lacks(nvidia_capability("cuda")):
        pytest.skip(f"this GPU lacks what {name} needs")
    x = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(2048, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(512, 2048, device="cuda", dtype=torch.bfloat16)
    if name == "mxfp8":
        from titan_quant.kernels import mxfp8

        out = mxfp8(x, weight, "rceil")
    else:
        out = linear(x, weight, Arithmetic(recipe, emulate=False))
    out.backward(grad)
    pairs = {"output": (x, weight), "grad_input": (grad, weight.T), "grad_weight": (grad.T, x.T)}
    for (product, (a, b)), got in zip(pairs.items(), (out, x.grad, weight.grad), strict=True):
        exact = a.detach().double() @ b.detach().double().T
        sums = a.detach().double().abs() @ b.detach().double().abs().T
        bound = product_bound(a.detach(), b.detach(), recipe.casts(product)) + exact.abs() * 2**-8 + sums * 2**-13
        assert ((got.double() - exact).abs() <= bound).all(), product


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.experts])
def test_grouped_products_of_the_hardware_are_the_emulated_ones(name):
    recipe = RECIPES[name]
    if recipe.lacks(nvidia_capability("cuda")):
        pytest.skip(f"this GPU lacks what {name} needs")
    counts = torch.tensor([70, 0, 300, 142], device="cuda")
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(4, 512, 256, device="cuda", dtype=torch.bfloat16)
    results = []
    for emulate in (True, False):
        ours, own = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = LowPrecisionProduct(Arithmetic(recipe, emulate))(ours, own, counts)
        out.backward(torch.ones_like(out))
        results.append((out.detach(), ours.grad, own.grad))
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6 * expected.abs().max().item())
