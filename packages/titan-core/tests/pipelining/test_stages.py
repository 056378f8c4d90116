import itertools

import pytest

from titan_core.pipelining.stages import balanced_stages, rank_of_stage


def cuts(costs, starts):
    return [sum(costs[a:b]) for a, b in itertools.pairwise([*starts, len(costs)])]


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("costs", [[1] * 7, [1, 1, 1, 1, 1, 4], [9, 1, 1, 1, 1, 1, 1, 9], [0, 0, 0, 0, 5, 1]])
def test_the_greatest_cost_is_least(costs, stages):
    starts = balanced_stages(costs, stages)
    assert starts[0] == 0
    assert len(starts) == stages == len(set(starts))
    every = ((0, *inner) for inner in itertools.combinations(range(1, len(costs)), stages - 1))
    assert max(cuts(costs, starts)) == min(max(cuts(costs, other)) for other in every)


def test_equal_costs_give_equal_stages():
    assert balanced_stages([1.0] * 12, 4) == [0, 3, 6, 9]


def test_a_heavy_head_gets_fewer_blocks_beside_it():
    assert balanced_stages([1.0] * 7 + [3.0], 2) == [0, 5]


def test_more_stages_than_blocks_are_refused():
    with pytest.raises(ValueError, match="2 blocks cannot be cut into 3 stages"):
        balanced_stages([1.0, 1.0], 3)


def test_ranks_of_stages():
    assert [rank_of_stage(stage, 3, "loop") for stage in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [rank_of_stage(stage, 3, "v") for stage in range(6)] == [0, 1, 2, 2, 1, 0]
