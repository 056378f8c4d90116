import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ranks import run_ranks
from titan_metrics.probes import links
from titan_metrics.probes.links import OPERATIONS, bus_bandwidth, bus_factor, exchange

CPU = torch.device("cpu")


def test_factors_are_those_of_nccl_tests():
    assert [bus_factor(operation, 4) for operation in OPERATIONS] == [1.5, 0.75, 0.75, 0.75, 1.0]


def test_every_operation_runs_on_each_axis_of_a_mesh():
    def measure():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        groups = [mesh.get_group("dp"), mesh.get_group("tp"), dist.group.WORLD]
        return [
            bus_bandwidth(operation, group, CPU, num_bytes=2**16, repetitions=2)
            for group in groups
            for operation in OPERATIONS
        ]

    for found in run_ranks(4, measure):
        assert len(found) == 15
        assert min(found) > 0


@pytest.mark.parametrize(
    ("operation", "result"),
    [
        ("all_reduce", [3, 3, 3, 3, 3, 3]),
        ("all_gather", [10, 10, 20, 20, 30, 30]),
        ("reduce_scatter", [6, 6]),
        ("all_to_all", [1, 1, 2, 2, 3, 3]),
        ("send_recv", [2, 2, 2, 2, 2, 2]),  # on the last rank, of the one before it
    ],
)
def test_each_operation_does_what_its_name_says(operation, result):
    def do():
        number = dist.get_rank() + 1.0
        whole, other = torch.full((6,), number), torch.full((6,), 10 * number)
        exchange(operation, dist.group.WORLD, whole, other)()
        return (whole if operation in ("all_reduce", "all_gather") else other[: len(result)]).tolist()

    assert run_ranks(3, do)[2] == result


def test_bandwidth_is_bytes_by_factor_by_time(monkeypatch):
    monkeypatch.setattr(links, "median_seconds", lambda action, device, repetitions, before: 0.5)

    def measure():
        return bus_bandwidth("all_reduce", dist.group.WORLD, CPU, num_bytes=1003, repetitions=1)

    assert run_ranks(2, measure) == [1000 * 1.0 / 0.5] * 2  # 1003 bytes are 125 float32 a rank
