import pytest

from titan_quant.flops import flops_by_precision
from titan_quant.recipes import RECIPES

FORWARD = {"wq": 30.0, "wo": 10.0, "attention": 20.0, "lm_head": 40.0}


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("none", {"high": 1.0}),
        ("float8_tensorwise", {"high": 0.6, "float8": 0.4}),
        ("float8_rowwise_with_gw_hp", {"high": 0.6 + 0.4 / 3, "float8": 0.8 / 3}),
        ("mxfp8", {"high": 0.6, "float8": 0.4}),
        ("nvfp4", {"high": 0.6, "float4": 0.4}),
    ],
)
def test_each_product_counts_in_its_precision(name, shares):
    assert flops_by_precision(FORWARD, ["wq", "wo"], RECIPES[name]) == pytest.approx(shares)


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="FLOPs of w1, w2 are not given"):
        flops_by_precision(FORWARD, ["wq", "w2", "w1"], RECIPES["mxfp8"])
    with pytest.raises(ValueError, match="No module has FLOPs"):
        flops_by_precision({}, [], RECIPES["mxfp8"])
