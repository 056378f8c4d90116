import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ranks import run_ranks
from titan_quant.compat import gather_ranks, sum_scattered
from titan_quant.config import QuantConfig
from titan_quant.convert import quantize
from titan_quant.recipes import RECIPES
from titan_quant.tensor_parallel import (
    TensorParallelError,
    float8_regions,
    gather_float8,
    scatter_sum_float8,
    share_scales,
)

ROLES = {"region": "region", "region.w1": "colwise", "region.w2": "rowwise"}


class Region(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(64, 128, bias=False)
        self.w2 = nn.Linear(128, 64, bias=False)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)))


def build(name, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.ModuleDict({"region": Region()}).to(dtype)
    conversion = quantize(model, QuantConfig(recipe=name, emulate=True, skip_small=False))
    return model, conversion, torch.randn(2, 16, 64).to(dtype), torch.randn(2, 16, 64).to(dtype)


def whole(name, dtype=torch.float32):
    model, _, x, grad = build(name, dtype)
    x.requires_grad_()
    out = model["region"](x)
    out.backward(grad)
    return out.detach(), x.grad, model["region"].w1.weight.grad, model["region"].w2.weight.grad


class _Plain:
    """What passes between ranks, unrounded."""

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, group):
            ctx.group = group
            return torch.cat(gather_ranks(x.contiguous(), group).chunk(2), 1)

        @staticmethod
        def backward(ctx, grad):
            return sum_scattered(torch.cat(grad.chunk(2, 1)), ctx.group), None

    class Scatter(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, group):
            ctx.group = group
            return sum_scattered(torch.cat(x.chunk(2, 1)), group)

        @staticmethod
        def backward(ctx, grad):
            return torch.cat(gather_ranks(grad.contiguous(), ctx.group).chunk(2), 1), None


def cut(name, *, float8, dtype=torch.float32):
    """The same on this rank of two, with the sequence cut between regions."""
    group, me = dist.group.WORLD, dist.get_rank()
    model, _, x, grad = build(name, dtype)
    region = model["region"]
    region.w1.weight = nn.Parameter(region.w1.weight.detach().chunk(2)[me].clone())
    region.w2.weight = nn.Parameter(region.w2.weight.detach().chunk(2, 1)[me].clone())
    share_scales(model, ROLES, group)
    own = x.chunk(2, 1)[me].clone().requires_grad_()
    gathered = gather_float8(own, 1, group) if float8 else _Plain.Gather.apply(own, group)
    out = region(gathered)
    out = scatter_sum_float8(out, 1, group) if float8 else _Plain.Scatter.apply(out, group)
    out.backward(grad.chunk(2, 1)[me])
    return out.detach(), own.grad, region.w1.weight.grad, region.w2.weight.grad


def joined(parts):
    return [torch.cat(tensors, dim) for tensors, dim in zip(zip(*parts, strict=True), (1, 1, 0, 1), strict=True)]


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "none"])
def test_two_ranks_compute_what_one_does(name):
    parts = joined(run_ranks(2, cut, name, float8=False))
    for got, expected in zip(parts, whole(name), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_and_gradients_can_travel_as_float8_between_tensorwise_layers(dtype):
    """Nothing changes: what travels is rounded as the layers round it."""
    name = "float8_tensorwise"
    travelled, plain = (joined(run_ranks(2, cut, name, float8=float8, dtype=dtype)) for float8 in (True, False))
    for got, expected in zip(travelled, plain, strict=True):
        if dtype == torch.bfloat16:
            assert torch.equal(got, expected)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_what_travels_is_bytes(monkeypatch):
    def rank():
        sent = []
        gather = torch.ops._c10d_functional.all_gather_into_tensor
        monkeypatch.setattr(
            torch.ops._c10d_functional, "all_gather_into_tensor", lambda x, *a: sent.append(x.nbytes) or gather(x, *a)
        )
        x = torch.randn(2, 8, 16, requires_grad=True)
        scatter_sum_float8(gather_float8(x, 1, dist.group.WORLD), 1, dist.group.WORLD).sum().backward()
        return sent

    assert run_ranks(2, rank) == [[2 * 8 * 16] * 2] * 2


def test_layers_share_scales_by_their_role_and_others_do_not():
    def rank():
        model, _, _, _ = build("float8_rowwise")
        mesh = init_device_mesh("cpu", (2,))
        weight = model["region"].w1.weight
        model["region"].w1.weight = nn.Parameter(distribute_tensor(weight.data, mesh, [Shard(0)]))
        share_scales(model, {"region.w1": "colwise", "elsewhere": "rowwise"}, mesh.get_group())
        return model["region"].w1.arithmetic.sharing.cut, model["region"].w2.arithmetic.sharing

    assert run_ranks(2, rank) == [(("weight", "gradient"), None)] * 2


def test_a_cut_between_values_that_share_a_scale_is_refused():
    def rank():
        model = nn.Sequential(nn.Linear(32, 64, bias=False))
        quantize(model, QuantConfig(recipe="mxfp8", emulate=True, skip_small=False))
        mesh = init_device_mesh("cpu", (2,))
        model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.data, mesh, [Shard(1)]))
        try:
            share_scales(model, {"0": "rowwise"}, mesh.get_group())
        except TensorParallelError as error:
            return str(error)

    assert all("leaves '0' 16 features on each of 2 ranks" in message for message in run_ranks(2, rank))


def test_where_float8_may_travel_follows_from_who_reads():
    _, conversion, _, _ = build("float8_tensorwise")
    regions = float8_regions(conversion, ROLES)
    assert regions.entered == ("region",)
    assert regions.left == ("region.w2",)
    with_gate = float8_regions(conversion, ROLES | {"region.gate": "gate"})
    assert with_gate.entered == ()
    assert with_gate.left == ("region.w2",)
    assert float8_regions(build("float8_rowwise")[1], ROLES).left == ()
