import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ranks import run_ranks
from titan_core.optimizers.blocks import as_rows
from titan_core.optimizers.stochastic import Draws, high_half, low_half, round_stochastically
from titan_core.shards import owned

EVERY = slice(None)


def bits(shape=(40, 60), *, seed=0, step=1, name="weight", purpose="moments"):
    return Draws(torch.empty(shape), seed, step, name, purpose).bits(EVERY)


def test_draws_are_even_in_every_bit_and_independent_of_their_neighbours():
    drawn = torch.stack([(bits((500, 800)) >> i) & 1 for i in range(32)]).float()
    deviation = 0.5 / drawn[0].numel() ** 0.5
    assert (drawn.mean((1, 2)) - 0.5).abs().max() < 4.5 * deviation
    signs = 2 * drawn - 1
    for neighbour in (signs.roll(1, 0), signs.roll(1, 1), signs.roll(1, 2)):
        assert (signs * neighbour).mean((1, 2)).abs().max() < 4.5 * 2 * deviation


def test_halves_are_evenly_spread_over_their_range():
    drawn = bits((1000, 1000))
    low, high = low_half(drawn), high_half(drawn.clone())
    for half in (low, high):
        assert half.min() >= 0
        assert half.max() < 2**16
        counts = torch.bincount(half.flatten() >> 8, minlength=256).double()
        chi_squared = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert chi_squared < 255 + 6 * (2 * 255) ** 0.5
    correlation = torch.corrcoef(torch.stack([low.flatten(), high.flatten()]).double())[0, 1]
    assert abs(correlation) < 5e-3


def test_draws_depend_on_seed_step_name_and_purpose_only():
    assert torch.equal(bits(), bits())
    for other in ({"seed": 1}, {"step": 2}, {"name": "bias"}, {"purpose": "parameter"}):
        assert (bits(**other) == bits()).float().mean() < 1e-2


def test_each_rank_has_the_draws_of_its_own_elements():
    shape = (6, 7, 20)
    whole = bits(shape).view(shape)

    def rank(mesh_shape, placements):
        mesh = init_device_mesh("cpu", mesh_shape)
        part = distribute_tensor(torch.empty(shape), mesh, placements, src_data_rank=None)
        drawn = Draws(part, 0, 1, "weight", "moments")
        rows = len(as_rows(part))
        pieces = torch.cat([drawn.bits(slice(0, rows // 2)), drawn.bits(slice(rows // 2, rows))])
        return torch.equal(pieces, whole[owned(part)].reshape(rows, -1))

    for layout in (((2,), [Shard(0)]), ((2,), [Shard(1)]), ((2,), [Shard(2)]), ((2, 2), [Shard(1), Shard(2)])):
        assert all(run_ranks(torch.Size(layout[0]).numel(), rank, *layout))


def test_a_vector_is_one_row_and_a_number_one_element():
    assert bits((50,)).shape == (1, 50)
    assert bits(()).shape == (1, 1)


def test_rounding_is_right_on_average_and_goes_to_a_neighbour():
    numbers = torch.tensor([1.0, -1.0, 1.001, -3.1415927, 1e-30, 7e30, 0.0])
    count = 2**16
    x = numbers[:, None].expand(-1, count).contiguous()
    evenly = torch.arange(count, dtype=torch.int32).expand(len(numbers), -1).clone()
    rounded = round_stochastically(x, evenly).double()
    # Every draw once: the mean is the number itself, to the last of its bits.
    assert torch.equal(rounded.mean(1).float(), numbers)
    gap = 2.0**-7 * numbers.abs()
    assert ((rounded - x).abs().amax(1) <= gap).all()

    drawn = round_stochastically(x, low_half(bits((len(numbers), count)))).double()
    assert ((drawn.mean(1) - numbers).abs() <= 4.5 * 0.5 * gap / count**0.5).all()


def test_numbers_of_bfloat16_and_those_that_are_none_stay_as_they_are():
    x = torch.tensor([1.0, -0.15625, 0.0, torch.inf, -torch.inf])
    most = torch.full(x.shape, 2**16 - 1, dtype=torch.int32)
    assert torch.equal(round_stochastically(x, most.clone()), x.bfloat16())
    assert round_stochastically(torch.tensor([torch.nan]), most[:1]).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_steps_add_up_which_rounding_to_nearest_loses(dtype):
    x, nearest = torch.ones(2000).bfloat16(), torch.ones(2000).bfloat16()
    for step in range(100):
        draws = Draws(x, 0, step, "weight", "parameter")
        x = round_stochastically(x.to(dtype)[None] + 1e-4, low_half(draws.bits(EVERY)))[0]
        nearest = (nearest.to(dtype) + 1e-4).bfloat16()
    assert x.double().mean() == pytest.approx(1.01, abs=5e-4)
    assert torch.equal(nearest, torch.ones(2000).bfloat16())
