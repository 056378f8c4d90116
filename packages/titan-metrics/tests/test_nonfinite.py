import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from ranks import run_ranks
from titan_metrics.nonfinite import NonFiniteError, NonFiniteWatch


class Log(nn.Module):
    def forward(self, x):
        return x.log()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.head = nn.Linear(4, 1)

    def forward(self, x, scale=1.0):
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x * scale)


def find(model, *inputs, **named):
    with NonFiniteWatch(model) as watch:
        model(*inputs, **named).sum().backward()
        with pytest.raises(NonFiniteError) as caught:
            watch.check()
    return [(culprit.rank, culprit.module, culprit.what) for culprit in caught.value.culprits]


def test_the_module_whose_output_broke_is_named():
    model = Model()
    with torch.no_grad():
        model.layers[1].weight[2, 3] = torch.nan
    assert find(model, torch.ones(2, 4)) == [(0, "layers.1", "output")]


def test_a_bad_input_of_the_model_is_its_own():
    assert find(Model(), torch.full((2, 4), torch.inf)) == [(0, "", "input")]


def test_what_outer_code_broke_is_seen_where_it_goes_in():
    assert find(Model(), torch.ones(2, 4), scale=torch.nan) == [(0, "head", "input")]


def test_a_gradient_that_breaks_is_named():
    # sqrt(0) is 0, and its slope is infinite.
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Identity())
    model[1].forward = torch.sqrt
    ((rank, module, what),) = find(model, torch.zeros(1, 2))
    assert (rank, module, what) == (0, "0", "gradient of the output")


def test_a_sound_step_raises_nothing_and_is_forgotten():
    model = Model()
    with NonFiniteWatch(model) as watch:
        for _ in range(2):
            model(torch.ones(2, 4)).sum().backward()
            watch.check()
            assert watch._flags == []


def test_no_hook_is_left_behind():
    model = Model()
    with NonFiniteWatch(model):
        assert model.head._forward_hooks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of the compiler's own
def test_what_is_compiled_shows_in_the_next_modules_input():
    model = Model()
    model.layers[1].compile(backend="eager")
    with torch.no_grad():
        model.layers[1].weight.fill_(torch.nan)
    assert find(model, torch.ones(2, 4)) == [(0, "layers.2", "input")]


def test_sharded_and_recomputed_modules_are_seen():
    def train():
        model = Model()
        if dist.get_rank() == 1:
            with torch.no_grad():
                model.layers[1].weight.fill_(torch.nan)
        for layer in model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        run = model.layers[1].forward
        model.layers[1].forward = lambda x: checkpoint(run, x, use_reentrant=False)
        with NonFiniteWatch(model) as watch:
            model(torch.ones(1, 4)).sum().backward()
            try:
                watch.check()
            except NonFiniteError as error:
                return [(culprit.module, culprit.what) for culprit in error.culprits]

    assert run_ranks(2, train) == [[("layers.1", "output")] * 2] * 2


def test_every_rank_hears_of_the_first():
    def train():
        model, rank = Model(), dist.get_rank()
        if rank == 1:
            with torch.no_grad():
                model.layers[2].weight.fill_(torch.inf)
        if rank == 2:
            with torch.no_grad():
                model.layers[0].bias.fill_(torch.nan)
        with NonFiniteWatch(model) as watch:
            model(torch.ones(1, 4))
            try:
                watch.check()
            except NonFiniteError as error:
                return [(culprit.rank, culprit.module) for culprit in error.culprits], str(error)

    for culprits, message in run_ranks(3, train):
        assert culprits == [(2, "layers.0"), (1, "layers.2")]
        assert "rank 2: the output of layers.0; also on rank 1: the output of layers.2" in message
