import pytest
import torch

from titan_quant.bounds import product_bound, rounding_bound
from titan_quant.formats import FORMATS, dequantize, quantize
from titan_quant.recipes import RECIPES, Cast

CASTS = {
    "e4m3": RECIPES["float8_tensorwise"].grad_input[1],
    "e5m2": RECIPES["float8_tensorwise"].grad_input[0],
    "row": RECIPES["float8_rowwise"].output[0],
    "power_of_two": RECIPES["float8_rowwise_with_gw_hp"].grad_input[1],
    **{rounding: RECIPES["mxfp8"].with_rounding(rounding).output[0] for rounding in ("rceil", "floor", "ceil", "even")},
    "nvfp4": RECIPES["nvfp4"].output[0],
}


def everywhere(cast: Cast) -> torch.Tensor:
    """Rows whose largest value moves through two powers of two, with all smaller sizes below it."""
    largest = torch.linspace(1.0, 4.0, 1024)
    below = 2.0 ** -torch.linspace(0, 30, 63)
    return torch.cat([largest[:, None], largest[:, None] * below], 1) * 0.37


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_rounding_stays_within_its_bound_which_is_no_larger_than_it_must_be(cast):
    x = everywhere(cast)
    rows = x if cast.scope != "tensor" else torch.cat([x, x * 2.0**-9])
    error = (dequantize(quantize(rows, cast)).double() - rows.double()).abs()
    bound = rounding_bound(rows, cast)
    assert (error <= bound).all()
    assert (error / bound).max() > 0.75


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_a_format_with_one_bit_less_breaks_the_bound(cast):
    """The bound is of this format: half the precision does not pass for it."""
    x = everywhere(cast)
    quantized = quantize(x, cast)
    step = 2.0 ** (quantized.codes.float().abs().clamp(min=1e-30).log2().floor() - FORMATS[cast.format].mantissa + 1)
    coarse = quantized._replace(codes=(quantized.codes.float() / step).round() * step)
    assert not ((dequantize(coarse).double() - x.double()).abs() <= rounding_bound(x, cast)).all()


def test_without_casts_only_the_sum_is_bounded():
    a, b = torch.randn(8, 4096), torch.randn(4, 4096)
    exact = a.double() @ b.double().T
    bound = product_bound(a, b, None)
    assert ((a @ b.T).double() - exact).abs().le(bound).all()
    assert (bound < 1e-3 * a.double().abs() @ b.double().abs().T).all()


def test_without_underflow_a_products_bound_is_that_of_the_relative_errors():
    a, b = torch.rand(8, 64) + 1, torch.rand(4, 64) + 1
    casts = RECIPES["float8_rowwise"].output
    u = 2.0**-4
    simple = (2 * u + u * u) * (a.double() @ b.double().T)
    # Half a step near zero, scaled by at most 2 * 2 / 448, is what it adds.
    assert (product_bound(a, b, casts) <= simple * (1 + 1e-3)).all()
    assert (product_bound(a, b, casts) >= simple).all()
