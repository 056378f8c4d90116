import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ranks import run_ranks
from titan_core.replicas.state import load_local_state, local_state


class Part:
    def __init__(self, state):
        self.state, self.loaded = state, None

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.loaded = state


def test_tensors_are_filled_in_place_and_values_handed_over():
    sender = {"a": Part({"w": torch.arange(3.0), "below": {"t": torch.ones(2), "n": 5}}), "b": Part({"step": 7})}
    sent = local_state(sender)
    assert sent["a"]["w"].data_ptr() == sender["a"].state["w"].data_ptr()  # nothing is copied
    own, below = torch.zeros(3), torch.zeros(2)
    receiver = {"a": Part({"w": own, "below": {"t": below, "n": 0}}), "b": Part({"step": 0})}
    load_local_state(receiver, sent)
    assert own.tolist() == [0, 1, 2]
    assert below.tolist() == [1, 1]
    assert receiver["a"].loaded["w"] is own
    assert receiver["a"].loaded["below"]["n"] == 5
    assert receiver["b"].loaded == {"step": 7}


def test_a_rank_sends_its_shard_only():
    def shards():
        mesh = init_device_mesh("cpu", (2,))
        tensor = distribute_tensor(torch.arange(6.0), mesh, [Shard(0)])
        sent = local_state({"part": Part({"w": tensor})})["part"]["w"]
        assert not isinstance(sent, DTensor)
        empty = distribute_tensor(torch.zeros(6), mesh, [Shard(0)])
        receiver = Part({"w": empty})
        load_local_state({"part": receiver}, {"part": {"w": sent + 10}})
        assert receiver.loaded["w"] is empty
        return sent.tolist(), empty.to_local().tolist()

    assert run_ranks(2, shards) == [([0, 1, 2], [10, 11, 12]), ([3, 4, 5], [13, 14, 15])]
