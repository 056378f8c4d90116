import torch.distributed as dist

from titan_core.config import ParallelConfig
from titan_core.pipelining.schedule_order import compute_order


def spelt(config, micro_batches):
    return [
        " ".join(f"{stage}{kind}{micro_batch}" for stage, kind, micro_batch in actions)
        for actions in compute_order(config, micro_batches).values()
    ]


def test_the_order_is_that_of_torchs_schedules():
    assert spelt(ParallelConfig(pp=2), 2) == ["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"]
    v = spelt(ParallelConfig(pp=2, pp_schedule="DualPipeV"), 4)
    assert [{action[0] for action in actions.split()} for actions in v] == [{"0", "3"}, {"1", "2"}]
    assert not dist.is_initialized()
