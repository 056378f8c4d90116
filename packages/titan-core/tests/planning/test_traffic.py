import pytest
import torch
import torch.distributed as dist

from ranks import run_ranks
from titan_core.collectives import all_to_all, gather, scatter_sum, sum_forward
from titan_core.config import ParallelConfig
from titan_core.degrees import resolve_degrees
from titan_core.mesh import build_meshes
from titan_core.planning.traffic import Flow, TrafficRecorder, UnknownCollectiveError


def recorded(config, world_size, action):
    """The flows of each rank while `action(meshes)` runs, as (axis, kind, count, sent, received)."""

    def run():
        meshes = build_meshes(resolve_degrees(config, world_size), "cpu")
        with TrafficRecorder(meshes) as recorder:
            action(meshes)
        return [(f.axis, f.kind, f.count, f.sent_bytes, f.received_bytes) for f in recorder.flows()]

    return run_ranks(world_size, run)


def test_bytes_of_collectives_around_a_ring():
    def action(meshes):
        group = meshes.group("tp")
        x = torch.zeros(6, 4, requires_grad=True)
        gather(x, 0, group).sum().backward()  # 3 ranks: 96 bytes from each of two others, and back
        scatter_sum(x, 0, group)  # parts of 2 x 4 floats
        sum_forward(x[:1], group)  # 4 floats in 3 parts, rounded up to 2

    expected = [
        ("tp", "all-gather", 1, 192, 192),
        ("tp", "all-reduce", 1, 32, 32),
        ("tp", "reduce-scatter", 2, 256, 256),
    ]
    assert recorded(ParallelConfig(tp=3), 3, action) == [expected] * 3


def test_bytes_of_torchs_own_collectives():
    def action(meshes):
        group = meshes.group("tp")
        part, whole = torch.zeros(3), torch.zeros(6)
        dist.all_gather_single(whole, part, group=group)
        dist.reduce_scatter_single(part, whole, group=group)
        dist.all_reduce(whole, group=group)
        dist.all_gather([torch.zeros(3), torch.zeros(3)], part, group=group)
        dist.all_to_all_single(whole, whole.clone(), group=group)

    expected = [
        ("tp", "all-gather", 2, 24, 24),
        ("tp", "all-reduce", 1, 24, 24),
        ("tp", "all-to-all", 1, 12, 12),
        ("tp", "reduce-scatter", 1, 12, 12),
    ]
    assert recorded(ParallelConfig(tp=2), 2, action) == [expected] * 2


def test_collectives_of_all_ranks_are_the_worlds():
    def action(meshes):
        dist.all_reduce(torch.ones(4))

    assert recorded(ParallelConfig(tp=2), 4, action) == [[("world", "all-reduce", 1, 24, 24)]] * 4


def test_uneven_messages_are_counted_as_they_are():
    def action(meshes):
        rank = dist.get_rank()
        x = torch.zeros(3, 5)
        all_to_all(x, [2, 2] if rank == 0 else [1, 1], [2, 1], meshes.group("cp"))
        other = torch.zeros(7)
        work = dist.isend(other, 1 - rank) if rank == 0 else dist.irecv(other, 1 - rank)
        work.wait()

    first, second = recorded(ParallelConfig(cp=2), 2, action)
    assert first == [("cp", "all-to-all", 1, 20, 40), ("cp", "send", 1, 28, 0)]
    assert second == [("cp", "all-to-all", 1, 40, 20), ("cp", "receive", 1, 0, 28)]


def test_a_group_of_one_rank_sends_nothing():
    assert recorded(ParallelConfig(), 2, lambda meshes: sum_forward(torch.ones(4), meshes.group("tp"))) == [[], []]


def test_a_collective_whose_bytes_are_unknown_is_refused():
    def run():
        with TrafficRecorder(None), pytest.raises(UnknownCollectiveError, match=r"c10d\.broadcast_ are unknown"):
            dist.broadcast(torch.ones(2), src=0)

    run_ranks(2, run)


def test_the_cause_is_who_asks():
    from titan_core.clip import clip_gradients
    from titan_core.fsdp import fully_shard

    def run():
        meshes = build_meshes(resolve_degrees(ParallelConfig(), 2), "cpu")
        model = torch.nn.Linear(4, 4, bias=False)
        fully_shard(model, mesh=meshes.dense["fsdp"])
        with TrafficRecorder(meshes) as recorder:
            model(torch.ones(2, 4)).sum().backward()
            clip_gradients(model.parameters(), 1.0)
        return recorder.flows()

    def flow(kind, cause, count, size, dtype="float32"):
        sizes = {"sent_bytes": size, "received_bytes": size}
        return Flow(axis="fsdp", kind=kind, cause=cause, dtype=dtype, count=count, **sizes)

    expected = [
        flow("all-gather", "parameters gathered by FSDP", 1, 32),
        flow("all-reduce", "gradient norm", 1, 16, "float64"),
        flow("reduce-scatter", "gradients reduced by FSDP", 1, 32),
    ]
    assert run_ranks(2, run) == [expected] * 2
