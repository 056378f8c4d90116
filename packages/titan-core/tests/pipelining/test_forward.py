import pytest
import torch
import torch.distributed as dist

from ranks import run_ranks
from titan_core.pipelining.forward import forward

ORDERS = {
    "one stage a rank": [0, 1, 2],
    "loops": [0, 1, 2, 0, 1, 2],
    "a V": [0, 1, 2, 2, 1, 0],
}


class Stage(torch.nn.Module):
    """Notes its number behind those of the stages before it, beside what the micro-batch brings for it."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x, mark):
        return x * 10 + self.number + mark


def run(ranks, count):
    group = dist.group.WORLD
    parts = {number: Stage(number) for number, rank in enumerate(ranks) if rank == group.rank()}
    micro_batches = [(torch.full((1, 2), float(i)), {"mark": torch.tensor(0.1)}) for i in range(count)]
    outputs = forward(parts, ranks, micro_batches, torch.empty(1, 2), group)
    return [output[0, 0].item() for output in outputs]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("count", [1, 3, 5])
def test_every_micro_batch_passes_all_stages_in_order(order, count):
    ranks = ORDERS[order]
    expected = [float(i) for i in range(count)]
    for number in range(len(ranks)):
        expected = [value * 10 + number + 0.1 for value in expected]
    found = run_ranks(3, run, ranks, count)
    assert found[ranks[-1]] == pytest.approx(expected)
    assert [values for rank, values in enumerate(found) if rank != ranks[-1]] == [[], []]
