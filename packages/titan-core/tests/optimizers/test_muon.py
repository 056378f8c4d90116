"""Muon against NumPy, and on every way to spread matrices over ranks against one process."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ranks import run_ranks
from titan_core.config import MuonConfig
from titan_core.optimizers.muon import Muon, orthogonalise
from titan_core.shards import is_dtensor, local, owned

EXACT = MuonConfig(ns_dtype="float64")
STEPS = 3


def quintic(matrix, steps=5):
    """Five steps of Newton-Schulz as published, without transposing tall matrices."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(steps):
        inner = x.T @ x
        x = 3.4445 * x - 4.7750 * x @ inner + 2.0315 * x @ inner @ inner
    return x


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(2, 20, 30), (3, 30, 20), (1, 25, 25), (1, 1, 9), (1, 9, 1)])
def test_singular_values_come_near_one(shape):
    matrices = gaussian(*shape)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        found = orthogonalise(matrices.to(dtype), 5)
        assert found.dtype == dtype
        values = torch.linalg.svdvals(found.double())
        assert values.min() > 0.6
        assert values.max() < 1.25
        expected = np.stack([quintic(matrix) for matrix in matrices.numpy()])
        np.testing.assert_allclose(found.double().numpy(), expected, atol=tolerance)


def test_zeros_stay_zeros_and_small_matrices_are_not_taken_for_zeros():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        stack = torch.stack([torch.zeros(4, 6), gaussian(4, 6, dtype=torch.float32)]).to(dtype)
        found = orthogonalise(stack * 2.0**-60, 5)
        assert not found[0].any()
        assert torch.equal(found, orthogonalise(stack, 5))


def test_norms_are_taken_in_at_least_float32():
    matrices = gaussian(3, 40, 50).bfloat16()
    expected = matrices.float() / matrices.float().square().sum((1, 2), keepdim=True).sqrt()
    assert torch.equal(orthogonalise(matrices, 0), expected.bfloat16())


def group(parameters, lr=0.02, weight_decay=0.1):
    return {"params": list(parameters), "lr": lr, "weight_decay": weight_decay}


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["rms", "spectral"])
@pytest.mark.parametrize("shape", [(8, 3), (3, 8), (2, 6, 5)])
def test_steps_are_those_of_the_papers(nesterov, scale, shape):
    parameter = nn.Parameter(gaussian(*shape))
    weights, momentum = parameter.detach().numpy().copy(), np.zeros(shape)
    optimizer = Muon([group([parameter])], MuonConfig(momentum=0.9, nesterov=nesterov, scale=scale, ns_dtype="float64"))
    rows, columns = shape[-2:]
    size = 0.2 * np.sqrt(max(rows, columns)) if scale == "rms" else np.sqrt(max(1, rows / columns))
    for step in range(STEPS):
        gradient = gaussian(*shape, seed=step + 1)
        parameter.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient.numpy()
        update = 0.9 * momentum + 0.1 * gradient.numpy() if nesterov else momentum
        flat = update.reshape(-1, rows, columns)
        whole = np.stack([quintic(matrix) for matrix in flat]).reshape(shape)
        weights = weights * (1 - 0.02 * 0.1) - 0.02 * size * whole
        np.testing.assert_allclose(parameter.detach().numpy(), weights, rtol=1e-12, atol=1e-14)


def test_an_update_is_as_large_as_that_of_adamw():
    parameter = nn.Parameter(torch.zeros(64, 32, dtype=torch.float64))
    parameter.grad = gaussian(64, 32)
    Muon([group([parameter], lr=1.0, weight_decay=0.0)], EXACT).step()
    assert parameter.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)  # arXiv 2502.16982, section 2.2


def test_each_group_has_its_own_learning_rate_and_decay():
    first, second = (nn.Parameter(torch.ones(4, 4, dtype=torch.float64)) for _ in range(2))
    first.grad, second.grad = torch.zeros_like(first), torch.zeros_like(second)
    Muon([group([first], lr=0.5), group([second], weight_decay=0.0)], EXACT).step()
    assert torch.equal(first, torch.full_like(first, 1 - 0.5 * 0.1))
    assert torch.equal(second, torch.ones_like(second))


def test_a_parameter_without_a_gradient_stays_as_it_is():
    moved, still = (nn.Parameter(gaussian(4, 6)) for _ in range(2))
    before = still.detach().clone()
    optimizer = Muon([group([moved, still])], EXACT)
    moved.grad = gaussian(4, 6, seed=1)
    optimizer.step()
    assert torch.equal(still, before)
    assert not torch.equal(moved, before)
    assert still not in optimizer.state


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_in_bfloat16_leads_nearly_to_where_it_leads_in_float32(nesterov):
    config, ends, momenta = MuonConfig(nesterov=nesterov, ns_dtype="float32"), {}, {}
    for dtype in ("float32", "bfloat16"):
        parameter = nn.Parameter(gaussian(24, 40, dtype=torch.float32))
        optimizer = Muon([group([parameter])], config, state_dtype=dtype)
        for step in range(10):
            parameter.grad = gaussian(24, 40, seed=step + 1, dtype=torch.float32)
            optimizer.step()
        ends[dtype], momenta[dtype] = parameter.detach(), optimizer.state[parameter]["momentum"]
    assert momenta["float32"].dtype == torch.float32
    assert momenta["bfloat16"].dtype == torch.bfloat16
    torch.testing.assert_close(momenta["bfloat16"].float(), momenta["float32"], rtol=0.02, atol=0.002)
    way = (ends["float32"] - gaussian(24, 40, dtype=torch.float32)).norm()
    assert 0 < (ends["bfloat16"] - ends["float32"]).norm() < 0.02 * way


def test_weights_in_bfloat16_have_momentum_in_float32():
    parameter = nn.Parameter(gaussian(4, 6, dtype=torch.bfloat16))
    parameter.grad = gaussian(4, 6, seed=1, dtype=torch.bfloat16)
    optimizer = Muon([group([parameter])], MuonConfig())
    optimizer.step()
    assert optimizer.state[parameter]["momentum"].dtype == torch.float32
    torch.testing.assert_close(optimizer.state[parameter]["momentum"], 0.05 * parameter.grad.float())


def with_others(seed):
    matrix, vector = nn.Parameter(gaussian(4, 6, seed=seed)), nn.Parameter(gaussian(6, seed=seed))
    others = torch.optim.AdamW([vector], lr=0.02)
    return [matrix, vector], Muon([group([matrix])], EXACT, others=others)


def move(parameters, optimizer, seed):
    for parameter in parameters:
        parameter.grad = gaussian(*parameter.shape, seed=seed)
    return optimizer.step(lambda: sum(p.sum() for p in parameters))


def test_others_are_moved_by_their_own_optimizer():
    (_, vector), _ = pair = with_others(1)
    alone = nn.Parameter(vector.detach().clone())
    adamw = torch.optim.AdamW([alone], lr=0.02)
    for seed in (3, 4):
        before = sum(p.sum() for p in pair[0])
        assert move(*pair, seed) == before
        move([alone], adamw, seed)
    assert torch.equal(vector, alone)
    assert len(pair[1].param_groups) == 2


def test_the_state_dict_of_torch_continues_bitwise():
    parameters, optimizer = with_others(1)
    move(parameters, optimizer, 3)
    again, fresh = with_others(2)
    with torch.no_grad():
        for parameter, other in zip(again, parameters, strict=True):
            parameter.copy_(other)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in (*optimizer.param_groups, *fresh.param_groups):
        group["lr"] = 0.5
    for seed in (4, 5):
        move(parameters, optimizer, seed)
        move(again, fresh, seed)
    assert all(torch.equal(*both) for both in zip(parameters, again, strict=True))


# Rows that no number of ranks divides, fewer rows than ranks, tall and wide, and stacks.
SHAPES = {"plain": (7, 5), "few": (2, 6), "column": (8, 6), "row": (5, 12), "experts": (4, 6, 5), "tall": (4, 9, 3)}


class Matrices(nn.Module):
    def __init__(self):
        super().__init__()
        for i, (name, shape) in enumerate(SHAPES.items()):
            self.register_parameter(name, nn.Parameter(gaussian(*shape, seed=i)))

    def cut(self, mesh, **placements):
        for name, placement in placements.items():
            cut = distribute_tensor(getattr(self, name).detach(), mesh, placement)
            self.register_parameter(name, nn.Parameter(cut))


def train(lay_out=None, config=EXACT, state_dtype="float32"):
    """The parts of this rank after some steps, and where they lie: name -> (box, weights, momentum)."""
    model = Matrices()
    if lay_out is not None:
        lay_out(model)
    parameters = dict(model.named_parameters())
    names = list(parameters)
    groups = [group(parameters[name] for name in part) for part in (names[:2], names[2:])]
    optimizer = Muon(groups, config, state_dtype=state_dtype)
    for step in range(STEPS):
        for i, parameter in enumerate(parameters.values()):
            part = gaussian(*parameter.shape, seed=100 * step + i)[owned(parameter)]
            if is_dtensor(parameter):
                where = {"device_mesh": parameter.device_mesh, "placements": parameter.placements}
                part = DTensor.from_local(part, **where, shape=parameter.shape, stride=parameter.stride())
            parameter.grad = part
        optimizer.step()
    momenta = {name: optimizer.state[parameter]["momentum"] for name, parameter in parameters.items()}
    return {name: (owned(p), local(p).detach(), local(momenta[name])) for name, p in parameters.items()}


def mesh(**axes):
    return init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))


def fsdp(model):
    fully_shard(model)


def tensor_parallel(model, tp=None):
    placements = {name: [Replicate()] for name in SHAPES} | {"column": [Shard(0)], "row": [Shard(1)]}
    model.cut(tp or mesh(tp=2), **placements)


def fsdp_and_tensor_parallel(model):
    both = mesh(fsdp=2, tp=2)
    tensor_parallel(model, both["tp"])
    fully_shard(model, mesh=both["fsdp"])


def uneven_fsdp_and_tensor_parallel(model):
    """Three ranks share the four rows that a tp rank has of eight."""
    both = mesh(fsdp=3, tp=2)
    tensor_parallel(model, both["tp"])
    fully_shard(model, mesh=both["fsdp"])


def replicas(model):
    fully_shard(model, mesh=mesh(replicate=2, fsdp=1))


def hybrid(model):
    fully_shard(model, mesh=mesh(replicate=2, fsdp=2))


def hybrid_and_tensor_parallel(model):
    everything = mesh(replicate=2, fsdp=2, tp=2)
    tensor_parallel(model, everything["tp"])
    fully_shard(model, mesh=everything["replicate", "fsdp"])


def part_of_a_pipeline(model):
    """Two groups of four ranks each do the same."""
    everything = mesh(pp=2, fsdp=2, tp=2)
    tensor_parallel(model, everything["tp"])
    fully_shard(model, mesh=everything["fsdp"])


def expert_parallel(model):
    model.cut(mesh(ep=2), experts=[Shard(0)], tall=[Shard(0)])


def experts_on_their_own_mesh(model):
    """Two layouts of the same four ranks: experts by ep, each cut by rows; the others by rows and columns."""
    model.cut(mesh(fsdp=2, ep=2), experts=[Shard(1), Shard(0)], tall=[Shard(2), Shard(0)])
    grid = mesh(fsdp=2, tp=2)
    model.cut(grid, column=[Shard(1), Shard(0)], row=[Shard(0), Shard(1)], plain=[Replicate(), Shard(0)])


def experts_with_copies(model):
    model.cut(mesh(replicate=2, ep=2), experts=[Replicate(), Shard(0)], tall=[Replicate(), Shard(1)])


LAYOUTS = {
    "fsdp-1": (1, fsdp),
    "fsdp-2": (2, fsdp),
    "fsdp-3": (3, fsdp),
    "fsdp-4": (4, fsdp),
    "tp-2": (2, tensor_parallel),
    "fsdp-2-tp-2": (4, fsdp_and_tensor_parallel),
    "fsdp-3-tp-2": (6, uneven_fsdp_and_tensor_parallel),
    "replicate-2": (2, replicas),
    "replicate-2-fsdp-2": (4, hybrid),
    "replicate-2-fsdp-2-tp-2": (8, hybrid_and_tensor_parallel),
    "pp-2-fsdp-2-tp-2": (8, part_of_a_pipeline),
    "ep-2": (2, expert_parallel),
    "fsdp-2-ep-2": (4, experts_on_their_own_mesh),
    "replicate-2-ep-2": (4, experts_with_copies),
}


def assert_equal(parts, expected, atol=1e-12):
    for name, (box, *tensors) in parts.items():
        for found, whole in zip(tensors, expected[name][1:], strict=True):
            assert found.shape == whole[box].shape
            torch.testing.assert_close(found, whole[box], rtol=0, atol=atol)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_does_not_change_the_result(layout):
    size, lay_out = LAYOUTS[layout]
    expected = train()
    for parts in run_ranks(size, train, lay_out):
        assert_equal(parts, expected)


def test_bfloat16_iterations_round_in_the_same_way_everywhere():
    config = MuonConfig()
    expected = train(config=config)
    rounding = (expected["plain"][1] - train()["plain"][1]).abs().max()
    assert 1e-5 < rounding < 1e-2
    for parts in run_ranks(4, train, fsdp_and_tensor_parallel, config):
        assert_equal(parts, expected)


def test_momentum_in_bfloat16_does_not_depend_on_the_layout():
    expected = train(state_dtype="bfloat16")
    assert expected["plain"][2].dtype == torch.bfloat16
    for lay_out in (fsdp_and_tensor_parallel, experts_on_their_own_mesh):
        for parts in run_ranks(4, train, lay_out, EXACT, "bfloat16"):
            assert_equal(parts, expected)
