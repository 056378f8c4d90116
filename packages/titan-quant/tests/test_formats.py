import pytest
import torch

from titan_quant.formats import FORMATS, TINY, dequantize, quantize
from titan_quant.recipes import RECIPES, Cast

E4M3 = Cast(format="float8_e4m3fn", scope="tensor", scale="float32")
E5M2 = Cast(format="float8_e5m2", scope="tensor", scale="float32")
ROW = Cast(format="float8_e4m3fn", scope="row", scale="power_of_two")
MXFP8 = Cast(format="float8_e4m3fn", scope="block", scale="e8m0", block=32)
NVFP4 = Cast(format="float4_e2m1fn_x2", scope="block", scale="e4m3", block=16)
ALL = [E4M3, E5M2, ROW, MXFP8, NVFP4]
IDS = ["e4m3", "e5m2", "row", "mxfp8", "nvfp4"]


def spread(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    """Numbers over many powers of two, with outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * 2.0 ** torch.randint(
        -12, 3, (rows, columns), generator=generator
    )
    x[::3, 1] *= 1000
    return x


def test_the_facts_are_torchs_own():
    for name in ("float8_e4m3fn", "float8_e5m2"):
        info, form = torch.finfo(getattr(torch, name)), FORMATS[name]
        assert form.largest == info.max
        assert 2.0**form.exponent <= info.max < 2.0 ** (form.exponent + 1)
        assert 2.0**-form.mantissa == info.eps
        assert form.step == info.smallest_normal * info.eps


@pytest.mark.parametrize("cast", ALL, ids=IDS)
def test_the_largest_value_uses_the_whole_range_and_zero_stays_zero(cast):
    x = torch.zeros(4, 64)
    x[:, 5], x[0, 6] = 3.0, -3.0
    quantized = quantize(x, cast)
    largest = FORMATS[cast.format].largest
    assert largest / 2 <= quantized.codes.float().abs().max() <= largest
    assert torch.equal(dequantize(quantized) == 0, x == 0)
    assert dequantize(quantized)[0, 6] == -dequantize(quantized)[0, 5]


@pytest.mark.parametrize("cast", ALL, ids=IDS)
@pytest.mark.parametrize("size", [2, 15, 32, 33, 100])
def test_a_last_block_need_not_be_full(cast, size):
    """What is alone in the last block has a scale of its own, and nothing else."""
    x = spread(5, size)
    values = dequantize(quantize(x, cast))
    assert values.shape == x.shape
    padded = torch.nn.functional.pad(x, (0, 28))
    assert torch.equal(dequantize(quantize(padded, cast))[:, :size], values)


@pytest.mark.parametrize("cast", ALL, ids=IDS)
def test_rounding_twice_is_rounding_once(cast):
    values = dequantize(quantize(spread(8, 64), cast))
    again = quantize(values, cast)
    torch.testing.assert_close(dequantize(again), values, rtol=3e-7, atol=0)


@pytest.mark.parametrize("cast", ALL, ids=IDS)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_scales_follow_the_size_of_the_numbers(cast, scale):
    """With a few powers of two in an operand, none underflows, however small all are."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).clamp(min=0.5)
    assert scale > TINY
    error = (dequantize(quantize(x * scale, cast)) / (x * scale) - 1).abs().max()
    assert error < (0.3 if cast is NVFP4 else 0.13)


@pytest.mark.parametrize("cast", ALL, ids=IDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_does_not_become_finite(cast, value):
    x = torch.ones(2, 64)
    x[1, 3] = value
    assert not dequantize(quantize(x, cast))[1, 3].isfinite()


def test_every_number_of_four_bits_is_hit_and_ties_go_to_even():
    cast = Cast(format="float4_e2m1fn_x2", scope="tensor", scale="float32")
    x = torch.tensor([[0.0, 0.25, 0.26, 0.75, 1.25, 1.3, 1.75, 2.5, 2.6, 3.5, 5.0, 5.1, 6.0, -0.75, -5.1]])
    expected = [0.0, 0.0, 0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 3.0, 4.0, 4.0, 6.0, 6.0, -1.0, -6.0]
    assert quantize(x, cast).codes.tolist() == [expected]


def test_scales_of_rows_are_powers_of_two_that_keep_the_largest_in_range():
    x = torch.cat([torch.full((1, 4), 448.0 * 2.0**e * f) for e in (-3, 0, 5) for f in (1.0, 1.0001, 0.9999)])
    quantized = quantize(x, ROW)
    assert torch.equal(quantized.scale.log2().round().exp2(), quantized.scale)
    assert quantized.codes.float().max() <= 448
    assert (quantized.codes.float() > 223).all()


@pytest.mark.parametrize(
    ("rounding", "scales"),
    [("floor", [0.5, 1.0, 1.0, 1.0]), ("ceil", [1.0, 1.0, 2.0, 2.0]), ("rceil", [1.0, 1.0, 1.0, 2.0]),
     ("even", [1.0, 1.0, 1.0, 1.0])],
)  # fmt: skip
def test_the_four_ways_to_a_block_scale(rounding, scales):
    """The largest values of the blocks: just below 2**8, 2**8 itself, the largest number, just above it."""
    x = torch.zeros(4, 32)
    x[:, 0] = torch.tensor([255.0, 256.0, 448.0, 449.0])
    cast = Cast(format="float8_e4m3fn", scope="block", scale="e8m0", block=32, rounding=rounding)
    assert quantize(x, cast).scale.flatten().tolist() == scales


def test_a_known_largest_magnitude_is_used_and_a_part_can_ask_for_the_wholes():
    x = spread(4, 32)
    for cast in (E4M3, NVFP4):
        whole = quantize(torch.cat([x, torch.full((1, 32), 5e4)]), cast)
        known = quantize(x, cast, amax=torch.tensor(5e4))
        asked = quantize(x, cast, share=lambda amax: amax.clamp(min=5e4))
        assert torch.equal(known.codes.float(), whole.codes[:4].float())
        assert torch.equal(asked.codes.float(), whole.codes[:4].float())
    rows = quantize(torch.cat([x, torch.full((4, 1), 5e4)], 1), ROW)
    asked = quantize(x, ROW, share=lambda amax: amax.clamp(min=5e4))
    assert torch.equal(asked.codes.float(), rows.codes[:, :-1].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["float8_tensorwise", "float8_rowwise"])
def test_float8_is_torchaos(torchao, name, dtype):
    utils = torchao.float8.float8_utils
    for cast in RECIPES[name].grad_input:
        x = spread(33, 48).to(dtype)
        by_row = cast.scope == "row"
        granularity = torchao.float8.config.ScalingGranularity
        theirs = utils.tensor_to_scale(
            x,
            getattr(torch, cast.format),
            scaling_granularity=granularity.AXISWISE if by_row else granularity.TENSORWISE,
            axiswise_dim=-1 if by_row else None,
            round_scales_to_power_of_2=by_row,
        )
        ours = quantize(x, cast)
        assert torch.equal(ours.scale, 1 / theirs)
        codes = utils.to_fp8_saturated(x.float() * theirs, getattr(torch, cast.format))
        assert torch.equal(ours.codes.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("rounding", ["floor", "rceil", "ceil", "even"])
def test_mxfp8_is_torchaos(torchao, rounding):
    mx = torchao.prototype.mx_formats
    x = spread(16, 128)
    cast = Cast(format="float8_e4m3fn", scope="block", scale="e8m0", block=32, rounding=rounding)
    scale, codes = mx.mx_tensor.to_mx(x, torch.float8_e4m3fn, 32, mx.config.ScaleCalculationMode(rounding))
    ours = quantize(x, cast)
    assert torch.equal(ours.scale, scale.float())
    assert torch.equal(ours.codes.view(torch.uint8), codes.view(torch.uint8))


def test_nvfp4_is_torchaos(torchao):
    nvfp4 = torchao.prototype.mx_formats.nvfp4_tensor
    x = spread(32, 64)
    outer = nvfp4.per_tensor_amax_to_scale(x.abs().max())
    theirs = nvfp4.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=outer)
    ours = quantize(x, NVFP4)
    assert torch.equal(ours.outer, outer)
    assert torch.equal(dequantize(ours), theirs.dequantize(torch.float32))
