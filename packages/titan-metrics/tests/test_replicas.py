import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ranks import run_ranks
from titan_metrics.replicas import ReplicasDifferError, check_replicas, checksum


def found_by(tensors, group=None):
    try:
        check_replicas(tensors, group)
    except ReplicasDifferError as error:
        return [(one.fqn, one.ranks, one.of) for one in error.found]
    return []


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]
)
def test_a_checksum_sees_every_bit_and_the_order(dtype):
    x = torch.arange(6).reshape(2, 3).to(dtype)
    assert checksum(x) == checksum(x.clone())
    assert checksum(x) != checksum(x.flip(0))
    flipped = x.clone()
    flipped.view(torch.uint8)[1, -1] ^= 1
    assert checksum(x) != checksum(flipped)


def test_zeros_of_both_signs_differ_and_large_tensors_are_read_to_the_end():
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    x = torch.zeros(2**21 + 1)
    y = x.clone()
    y[-1] = 1
    assert checksum(x) != checksum(y)


def test_the_odd_copy_is_named():
    def check():
        x, y = torch.ones(3), torch.ones(2)
        sound = found_by([("x", x), ("y", y)])
        if dist.get_rank() == 2:
            x[1] += 1e-7
        return sound, found_by([("x", x), ("y", y)])

    for sound, broken in run_ranks(3, check):
        assert sound == []
        assert broken == [("x", (2,), (0, 1, 2))]


def test_parts_of_a_dtensor_are_compared_with_their_copies_only():
    def check():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        w = distribute_tensor(torch.arange(8.0), mesh, [Replicate(), Shard(0)])
        sound = found_by([("w", w)])
        if dist.get_rank() == 3:
            w.to_local()[0] = 100.0
        return sound, found_by([("w", w)])

    for sound, broken in run_ranks(4, check):
        assert sound == []
        assert broken == [("w", (3,), (1, 3))]


def test_ranks_may_hold_other_tensors_as_in_a_pipeline():
    def check():
        rank = dist.get_rank()
        return found_by([(f"stage.{rank}", torch.full((2,), float(rank)))] if rank < 2 else [])

    assert run_ranks(3, check) == [[], [], []]


def test_a_group_compares_among_itself():
    def check():
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        pair = dist.get_rank() // 2
        return found_by([("x", torch.full((1,), float(pair if dist.get_rank() < 3 else 9)))], groups[pair])

    assert run_ranks(4, check) == [[], [], [("x", (3,), (2, 3))], [("x", (3,), (2, 3))]]
