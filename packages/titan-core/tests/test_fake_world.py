import pytest
import torch
import torch.distributed as dist

from titan_core.fake_world import fake_tensors, fake_world


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
