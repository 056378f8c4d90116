import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from ranks import run_ranks
from titan_metrics.norms import ParameterNorms, layer_of


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x):
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h).tanh()
        return self.head(h)


def step(model, names=None):
    """One measured step of SGD; the same on every rank."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = ParameterNorms(names or model.named_parameters())
    model(torch.arange(7)).square().sum().backward()
    norms.before_update()
    optimizer.step()
    return norms.after_update().numbers()


def build():
    torch.manual_seed(0)
    return Model()


def by_hand():
    model = build()
    before = {fqn: parameter.detach().clone() for fqn, parameter in model.named_parameters()}
    model(torch.arange(7)).square().sum().backward()
    expected = {}
    for layer in ("embed", "layers.0", "layers.1", "head"):
        own = {fqn: parameter for fqn, parameter in model.named_parameters() if fqn.startswith(f"{layer}.")}
        gradient = torch.cat([parameter.grad.flatten() for parameter in own.values()]).norm().item()
        expected[f"norms.gradient.{layer}"] = gradient
        expected[f"norms.update.{layer}"] = 0.1 * gradient
        expected[f"norms.parameter.{layer}"] = torch.cat([before[fqn].flatten() for fqn in own]).norm().item()
    return expected


@pytest.mark.parametrize(
    ("fqn", "layer"),
    [("layers.3.attention.wq.weight", "layers.3"), ("lm_head.weight", "lm_head"), ("0.weight", "0"), ("w", "w")],
)
def test_layers_are_named_after_blocks_and_modules(fqn, layer):
    assert layer_of(fqn) == layer


def test_norms_are_those_of_each_layer():
    assert step(build()) == pytest.approx(by_hand(), rel=1e-5)


def test_a_parameter_without_a_gradient_has_norm_0():
    model = nn.Linear(2, 2)
    norms = ParameterNorms(model.named_parameters())
    norms.before_update()
    found = norms.after_update().numbers()
    assert found["norms.gradient.weight"] == found["norms.update.weight"] == 0.0
    assert found["norms.parameter.weight"] == pytest.approx(model.weight.norm().item())


@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "copies", "mixed"])
def test_norms_are_the_same_on_every_layout(layout):
    def train():
        model = build()
        if layout == "fsdp":  # uneven: 7 rows on 4 ranks
            fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
        elif layout == "hsdp":
            fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
        elif layout == "mixed":  # one layer cut over pairs of ranks, the others copied
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))["tensor"]
            head = nn.Parameter(distribute_tensor(model.head.weight.detach(), mesh, [Shard(1)]))
            whole, model.head.weight = model.head.weight, head
            model.head.forward = lambda x: nn.functional.linear(x, head.full_tensor())
            del whole
        for parameter in model.parameters():  # forward gathers; the batch is the same on all ranks
            assert parameter.requires_grad
        return step(model)

    for found in run_ranks(4, train):
        assert found == pytest.approx(by_hand(), rel=1e-5)


def test_a_pipelines_ranks_see_all_stages():
    def train():
        model = build()
        own = ("embed", "layers.0") if dist.get_rank() == 0 else ("layers.1", "head")
        names = [(fqn, parameter) for fqn, parameter in model.named_parameters() if fqn.startswith(own)]
        return step(model, names)

    for found in run_ranks(2, train):
        assert found == pytest.approx(by_hand(), rel=1e-5)
