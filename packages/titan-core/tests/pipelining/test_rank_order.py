import pytest

from titan_core.config import ParallelConfig
from titan_core.pipelining.rank_order import UnknownOrderError, rank_order
from titan_core.pipelining.schedule_order import compute_order

ORDERS = [
    ("GPipe", None, 2, 3),
    ("1F1B", None, 4, 8),
    ("1F1B", None, 2, 2),
    ("Interleaved1F1B", None, 4, 12),
    ("Interleaved1F1B", 3, 2, 4),
    ("LoopedBFS", None, 2, 3),
]


@pytest.mark.parametrize(("schedule", "per_rank", "pp", "micro_batches"), ORDERS)
def test_the_order_is_that_of_torchs_schedule(schedule, per_rank, pp, micro_batches):
    config = ParallelConfig(pp=pp, pp_schedule=schedule, pp_stages_per_rank=per_rank)
    theirs = compute_order(config, micro_batches)
    assert {rank: rank_order(config, rank, micro_batches) for rank in range(pp)} == theirs


def test_a_file_says_the_order_itself(tmp_path):
    path = tmp_path / "schedule.csv"
    path.write_text("0F0,0B0\n1F0,1B0")
    assert rank_order(ParallelConfig(pp=2, pp_schedule_csv=str(path)), 1, 1) == [(1, "F", 0), (1, "B", 0)]
    path.write_text("0F0,0I0,0W0\n1F0,1I0,1W0")
    with pytest.raises(UnknownOrderError, match=r"schedule\.csv computes gradients of weights apart"):
        rank_order(ParallelConfig(pp=2, pp_schedule_csv=str(path)), 1, 1)


@pytest.mark.parametrize("schedule", ["ZBVZeroBubble", "DualPipeV", "InterleavedZeroBubble"])
def test_split_backwards_are_refused(schedule):
    with pytest.raises(UnknownOrderError, match=r"--dry-run, or plan for one of GPipe, 1F1B"):
        rank_order(ParallelConfig(pp=2, pp_schedule=schedule), 0, 4)
