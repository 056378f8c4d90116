import pytest

from titan_metrics.peaks import mixed_peak, peak_flops

# Dense peaks follow from the chip as well: units x FLOPs a unit and clock x GHz at boost. This checks the table against
# something that is not the datasheet's own number; a sparse peak would be out by two.
FROM_THE_CHIP = [
    ("Tesla V100-SXM2-16GB", "float16", 80 * 1024 * 1.530),
    ("NVIDIA A100-SXM4-80GB", "bfloat16", 108 * 2048 * 1.410),
    ("NVIDIA A10", "bfloat16", 72 * 1024 * 1.695),
    ("NVIDIA L4", "bfloat16", 58 * 1024 * 2.040),
    ("NVIDIA L40S", "float8", 142 * 2048 * 2.520),
    ("NVIDIA H100 80GB HBM3", "bfloat16", 132 * 4096 * 1.830),
    ("NVIDIA H100 80GB HBM3", "float8", 132 * 8192 * 1.830),
    ("NVIDIA H100 PCIe", "bfloat16", 114 * 4096 * 1.620),
    ("NVIDIA B200", "bfloat16", 148 * 8192 * 1.860),
    ("NVIDIA GeForce RTX 3090", "bfloat16", 82 * 512 * 1.695),
    ("NVIDIA GeForce RTX 4090", "bfloat16", 128 * 512 * 2.520),
    ("NVIDIA GeForce RTX 4090", "float32", 128 * 256 * 2.520),
    ("NVIDIA GeForce RTX 5090", "bfloat16", 170 * 512 * 2.407),
    ("AMD Instinct MI250X", "bfloat16", 110 * 1024 * 1.700),
    ("AMD Instinct MI300X", "bfloat16", 304 * 2048 * 2.100),
    ("AMD Instinct MI300X", "float32", 304 * 256 * 2.100),
    ("AMD Instinct MI325X", "float8", 304 * 4096 * 2.100),
    ("AMD Instinct MI355X", "bfloat16", 256 * 4096 * 2.400),
    ("AMD Instinct MI355X", "float8", 256 * 8192 * 2.400),
    ("NVIDIA B200", "float4", 148 * 32768 * 1.860),
    ("NVIDIA GeForce RTX 5090", "float4", 170 * 4096 * 2.407),
    ("AMD Instinct MI355X", "float4", 256 * 16384 * 2.400),
]


@pytest.mark.parametrize(("device", "dtype", "gflops"), FROM_THE_CHIP)
def test_peaks_are_what_the_chip_can_do(device, dtype, gflops):
    assert peak_flops(device, dtype) == pytest.approx(gflops * 1e9, rel=0.02)


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GB200", 2500),
        ("AMD Instinct MI300X VF", 1307.4),
    ],
)
def test_names_as_drivers_print_them(device, tflops):
    assert peak_flops(device) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        "",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",  # a slice of the card
        "GRID A100-10C",  # a virtual GPU
        "NVIDIA A100-SXM-64GB",  # another chip of that name
        "NVIDIA A10G",
        "NVIDIA L40",
        "NVIDIA H20",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "AMD Instinct MI250X/MI250",
        "Next year's GPU",
    ],
)
def test_unknown_devices_have_no_guessed_peak(device):
    assert peak_flops(device) is None


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("Tesla V100-SXM2-32GB", "bfloat16"),
        ("NVIDIA A100-SXM4-80GB", "float8"),
        ("NVIDIA H200", "float4"),
        ("NVIDIA B200", "float64"),
    ],
)
def test_arithmetic_that_is_lacking_or_unlisted_has_no_peak(device, dtype):
    assert peak_flops(device, "float32") is not None
    assert peak_flops(device, dtype) is None


def test_a_mixed_peak_is_the_time_that_each_part_takes():
    # 3/4 of the work at 1979 TFLOP/s and 1/4 at half of that take 0.75 + 0.5 units of time.
    mixed = mixed_peak("NVIDIA H100 80GB HBM3", {"float8": 0.75, "bfloat16": 0.25})
    assert mixed == pytest.approx(1979e12 / 1.25)
    assert mixed_peak("NVIDIA H100 80GB HBM3", {"bfloat16": 1.0}) == peak_flops("NVIDIA H100 80GB HBM3")


def test_a_mix_with_an_unknown_part_has_no_peak():
    assert mixed_peak("NVIDIA A100-SXM4-80GB", {"float8": 0.5, "bfloat16": 0.5}) is None
    assert mixed_peak("NVIDIA A100-SXM4-80GB", {"float8": 0.0, "bfloat16": 1.0}) is not None
    assert mixed_peak("cpu", {"bfloat16": 1.0}) is None


@pytest.mark.parametrize("shares", [{}, {"bfloat16": 0.5}, {"bfloat16": 1.5, "float8": -0.5}])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(ValueError, match="together they are 1"):
        mixed_peak("NVIDIA B200", shares)
