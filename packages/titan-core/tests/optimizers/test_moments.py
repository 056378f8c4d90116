import pytest
import torch

from titan_core.optimizers.moments import MomentStore, wide_dtype

ROWS, COLUMNS = 64, 1000  # blocks of 250 and 125 columns
EVERY = slice(None)


def moments(dtype, shape=(ROWS, COLUMNS), parameter_dtype=torch.float32):
    return MomentStore(dtype).moments_of(torch.zeros(shape, dtype=parameter_dtype))


def nbytes(state):
    return sum(tensor.nbytes for tensor in state.values())


SCALES = 2 * 4 * ROWS  # bytes of two float32 for each row
BYTES = {
    "float32": 8 * ROWS * COLUMNS,
    "bfloat16": 4 * ROWS * COLUMNS,
    "int8": 2 * ROWS * COLUMNS + 4 * SCALES,
    "int4": ROWS * COLUMNS + 8 * SCALES,
}


@pytest.mark.parametrize("dtype", BYTES)
def test_moments_take_the_bytes_that_they_should(dtype):
    state = moments(dtype).create()
    assert nbytes(state) == BYTES[dtype]
    assert nbytes({name: tensor.clone() for name, tensor in state.items()}) == BYTES[dtype]
    ratio = BYTES[dtype] / BYTES["float32"]
    assert ratio == pytest.approx({"float32": 1, "bfloat16": 1 / 2, "int8": 1 / 4, "int4": 1 / 8}[dtype], rel=0.07)


@pytest.mark.parametrize("dtype", BYTES)
def test_new_moments_are_zero(dtype):
    kept = moments(dtype)
    for moment in kept.read(kept.create(), EVERY):
        assert moment.shape == (ROWS, COLUMNS)
        assert moment.dtype == torch.float32
        assert not moment.any()


def gaussian(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Half the widest gap of the code books, and what rounding before the look-up adds; bfloat16 has 8 bits.
BOUNDS = {
    "bfloat16": (2**-8, 2**-8),
    "int8": (0.45 / 64 + 2**-12, 0.45 / 128 + 2**-12),
    "int4": (0.45 / 4 + 2**-12, 1 / 16 + 2**-12),
}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("outliers", [False, True])
def test_what_is_read_is_what_was_written_within_the_bound_of_the_format(dtype, outliers):
    kept = moments(dtype)
    state = kept.create()
    first, second = gaussian(0, ROWS, COLUMNS) * 1e-3, gaussian(1, ROWS, COLUMNS).square() * 1e-6
    if outliers:
        first[:, 10::250] *= 1e4
        second[:, 10::250] *= 1e8
    for rows in (slice(0, 40), slice(40, ROWS)):
        kept.write(state, rows, first[rows].clone(), second[rows].clone(), None)
    size = {"bfloat16": 1, "int8": 250, "int4": 125}[dtype]
    for written, read, bound in zip((first, second), kept.read(state, EVERY), BOUNDS[dtype], strict=True):
        errors, largest = ((x.view(ROWS, -1, size).abs().amax(-1)) for x in (read - written, written))
        assert (errors <= bound * largest * (1 + 1e-6)).all()


def test_second_moments_never_come_back_negative_and_in_half_a_byte_never_zero():
    second = gaussian(1, ROWS, COLUMNS).square()
    second[0, 0] = 1e9
    for dtype in ("int8", "int4"):
        kept = moments(dtype)
        state = kept.create()
        kept.write(state, EVERY, torch.zeros_like(second), second, None)
        read = kept.read(state, EVERY)[1]
        assert read.min() >= 0
        assert (read[0, 1] > 0) == (dtype == "int4")


@pytest.mark.parametrize("shape", [(5000,), (63, 64), (1, 4095)])
def test_vectors_and_small_matrices_stay_in_float32(shape):
    for dtype in ("int8", "int4"):
        assert {t.dtype for t in moments(dtype, shape).create().values()} == {torch.float32}
    assert {t.dtype for t in moments("bfloat16", shape).create().values()} == {torch.bfloat16}


def test_float32_is_the_least_that_float32_means():
    wide = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32}
    for parameter_dtype, expected in wide.items():
        assert wide_dtype(torch.zeros(1, dtype=parameter_dtype)) == expected
        state = moments("float32", parameter_dtype=parameter_dtype).create()
        assert {tensor.dtype for tensor in state.values()} == {expected}


def test_bfloat16_is_rounded_with_the_bits_that_are_given():
    kept = moments("bfloat16", (1, 2**16))
    state = kept.create()
    evenly = torch.arange(2**16, dtype=torch.int32)[None]
    number = torch.full((1, 2**16), 1.0009765625)  # an eighth of the gap above one
    kept.write(state, EVERY, number.clone(), number.clone(), evenly | evenly << 16)
    for moment in kept.read(state, EVERY):
        assert (moment > 1).float().mean().item() == 1 / 8
    kept.write(state, EVERY, number.clone(), number.clone(), None)
    assert all((moment == 1).all() for moment in kept.read(state, EVERY))


@pytest.mark.parametrize("dtype", BYTES)
def test_moments_may_rest_in_the_hosts_memory(dtype):
    parameter = torch.zeros(ROWS, COLUMNS)
    kept = MomentStore(dtype, on_host=True).moments_of(parameter)
    state = kept.create()
    assert {tensor.device.type for tensor in state.values()} == {"cpu"}
    first, second = gaussian(0, ROWS, COLUMNS), gaussian(1, ROWS, COLUMNS).square()
    kept.write(state, EVERY, first.clone(), second.clone(), None)
    elsewhere = moments(dtype)
    expected = elsewhere.create()
    elsewhere.write(expected, EVERY, first, second, None)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
