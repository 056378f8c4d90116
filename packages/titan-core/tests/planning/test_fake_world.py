from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ranks import run_ranks
from titan_core.config import ParallelConfig
from titan_core.degrees import resolve_degrees
from titan_core.fsdp import fully_shard
from titan_core.mesh import build_meshes
from titan_core.planning.explain import describe_meshes
from titan_core.planning.fake_world import fake_tensors, fake_world
from titan_core.shards import local


def test_one_process_is_one_of_many_ranks():
    with fake_world(300, 512):
        assert (dist.get_rank(), dist.get_world_size()) == (300, 512)
        dist.all_reduce(torch.ones(3))
        received = torch.zeros(2)
        dist.recv(received, src=301)
    assert not dist.is_initialized()


def test_the_world_ends_with_an_error():
    with pytest.raises(KeyError), fake_world(0, 2):
        raise KeyError
    assert not dist.is_initialized()


def test_fake_tensors_have_shapes_but_no_memory_and_no_values():
    with fake_tensors():
        product = torch.empty(2**20, 2**20) @ torch.empty(2**20, 2**20)
        assert product.shape == (2**20, 2**20)
        with pytest.raises(RuntimeError):
            product[0, 0].item()
    assert torch.ones(2).sum().item() == 2


def test_a_rank_of_a_large_world_does_not_work_for_all_of_them():
    """Neither groups nor tensors are made for each of 5,000 ranks; what is made is right."""

    def run():
        from torch.distributed import device_mesh

        made = []

        def new_group(**options):
            made.append(options["ranks"])
            return dist.new_group(**options)

        def new_empty(tensor, *args, **kwargs):
            made.append(tensor)
            return torch._C.TensorBase.new_empty(tensor, *args, **kwargs)

        degrees = resolve_degrees(ParallelConfig(tp=2), 5000)
        dist.destroy_process_group()
        with (
            mock.patch.object(device_mesh, "new_group", new_group),
            mock.patch.object(torch.Tensor, "new_empty", new_empty),
            fake_world(4998, 5000),
        ):
            meshes = build_meshes(degrees, "cpu")
            with torch.device("meta"):
                model = nn.Linear(6, 2499, bias=False)
            fully_shard(model, mesh=meshes.dense["fsdp"])
            shape = tuple(local(model.weight).shape)
            axes = {axis.name: axis.ranks for axis in describe_meshes(meshes)[0].axes}
        dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=1)
        return shape, axes, len(made)

    ((shape, axes, made),) = run_ranks(1, run)
    assert shape == (0, 6)
    assert axes["tp"] == (4998, 4999)
    assert axes["dp_shard"] == tuple(range(0, 5000, 2))
    assert axes["cp"] == (4998,)
    assert made < 50
