import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ranks import run_ranks
from titan_core.optimizers.blocks import Blocks, as_rows, row_numbers
from titan_core.shards import local


@pytest.mark.parametrize(
    ("columns", "size", "blocks"),
    [(512, 256, 2), (300, 150, 2), (257, 129, 2), (256, 256, 1), (12, 12, 1), (1000, 250, 4)],
)
def test_rows_are_cut_into_as_few_equal_blocks_as_the_largest_size_allows(columns, size, blocks):
    matrix = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
    found = Blocks(matrix, 256)
    assert found.cut(matrix).shape == (3, blocks, size)
    assert found.new_scales().shape == (3, blocks)
    scales = found.find_scales(found.cut(matrix))
    for i in range(blocks):
        assert torch.equal(scales[:, i], matrix[:, i * size : (i + 1) * size].abs().amax(1))
    assert torch.equal(found.join(found.cut(matrix)), matrix)
    assert found.own(scales).shape == (3, blocks, 1)


SHAPE = (6, 4, 24)
LAYOUTS = {
    "rows": ((4,), [Shard(0)]),
    "rows-uneven-and-empty": ((4,), [Shard(1)]),
    "between-blocks": ((2,), [Shard(2)]),
    "within-blocks": ((4,), [Shard(2)]),
    "rows-and-within-blocks": ((2, 4), [Shard(0), Shard(2)]),
    "copies-and-within-blocks": ((2, 4), [Replicate(), Shard(2)]),
    "twice-along-a-row": ((2, 4), [Shard(2), Shard(2)]),
    "a-rank-without-columns": ((5,), [Shard(2)]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_are_the_same_numbers_on_every_layout(layout):
    """Blocks of 12 columns."""
    whole = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    alone = Blocks(whole, 15)
    expected = alone.find_scales(alone.cut(as_rows(whole))).view(6, 4, 2)

    def rank(mesh_shape, placements):
        mesh = init_device_mesh("cpu", mesh_shape)
        part = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        blocks, rows = Blocks(part, 15), as_rows(part)
        scales = blocks.new_scales()
        cut = blocks.cut(rows)
        found = blocks.find_scales(cut)
        as_rows(scales).copy_(found)
        normal = cut / blocks.own(found).clamp(min=1e-9)
        return [
            torch.equal(scales.full_tensor(), expected),
            bool((normal.abs() <= 1).all()),
            torch.equal(blocks.join(cut), rows),
            local(scales).shape[-1],
        ]

    for equal, normal, joined, width in run_ranks(torch.Size(LAYOUTS[layout][0]).numel(), rank, *LAYOUTS[layout]):
        assert equal
        assert normal
        assert joined
        assert width == (1 if layout == "between-blocks" else 2)  # a rank keeps only its own where it can


def test_what_is_no_number_on_one_rank_shows_in_the_scale_of_all():
    def rank():
        mesh = init_device_mesh("cpu", (4,))
        whole = torch.ones(2, 12)
        whole[1, 0] = torch.nan
        part = distribute_tensor(whole, mesh, [Shard(1)], src_data_rank=None)
        blocks = Blocks(part, 12)
        return blocks.find_scales(blocks.cut(as_rows(part))).tolist()

    assert run_ranks(4, rank) == [[[1.0], [torch.inf]]] * 4


def test_rows_are_numbered_within_the_whole():
    def rank(placements):
        part = distribute_tensor(torch.empty(4, 6, 2), init_device_mesh("cpu", (2,)), placements, src_data_rank=None)
        return row_numbers(part).tolist()

    everything = list(range(24))
    assert row_numbers(torch.empty(4, 6, 2)).tolist() == everything
    assert run_ranks(2, rank, [Shard(0)]) == [everything[:12], everything[12:]]
    halves = [[6 * i + j for i in range(4) for j in range(start, start + 3)] for start in (0, 3)]
    assert run_ranks(2, rank, [Shard(1)]) == halves
