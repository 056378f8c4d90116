"""What may move parameters: verdicts on losses and norms, and optimizers that heed them bit by bit."""

import math
import statistics

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ranks import run_ranks
from titan_core.config import GuardConfig, MuonConfig, OptimizerConfig, ParamGroupConfig
from titan_core.loss_guard import LossGuard
from titan_core.optim import OptimizerState, build_optimizer, step_unless

CPU = torch.device("cpu")


def judged(guard, loss, norm=1.0):
    verdict = guard.judge(torch.tensor(loss, dtype=torch.float64), torch.tensor(norm))
    assert (verdict.dtype, verdict.shape) == (torch.float32, ())
    return bool(verdict)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (-math.inf, 1.0), (1.0, math.nan)])
@pytest.mark.parametrize("sigma", [0.0, 3.0])
def test_what_is_not_finite_is_bad_and_not_remembered(loss, norm, sigma):
    guard = LossGuard(GuardConfig(sigma=sigma, window=4), CPU)
    assert not judged(guard, 2.0)
    assert judged(guard, loss, norm)
    assert guard.state_dict()["good"] == 1
    assert guard.state_dict()["losses"].isfinite().all()


def test_a_spike_is_far_above_the_last_good_losses_once_there_are_enough():
    guard, window = LossGuard(GuardConfig(sigma=3.0, window=4), CPU), []
    for loss in (5.0, 100.0, 4.0, 3.5, 3.4, 3.3, 3.2, 3.1):  # the second comes too early to be one
        assert not judged(guard, loss)
        window = [*window, loss][-4:]
    limit = statistics.mean(window) + 3 * statistics.stdev(window)
    assert judged(guard, limit + 1e-9)
    assert judged(guard, limit + 1e-9)  # bad ones do not move the limit
    assert guard.limit.item() == pytest.approx(limit)
    assert not judged(guard, limit - 1e-9)
    assert not judged(guard, 0.1)  # what falls is no spike


def test_without_sigma_nothing_finite_is_bad():
    guard = LossGuard(GuardConfig(), CPU)
    assert not any(judged(guard, loss) for loss in [1.0] * 200 + [1e30])


def test_it_goes_on_from_its_state():
    first, second = (LossGuard(GuardConfig(sigma=2.0, window=3), CPU) for _ in range(2))
    for loss in (1.0, 1.1, 0.9, 1.05):
        judged(first, loss)
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    for loss in (1.2, 1.3, 1.0, 1.25):
        assert judged(first, loss) == judged(second, loss)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_problems_name_the_field_and_what_has_no_effect():
    assert GuardConfig().problems() == []
    assert GuardConfig(policy="rewind", sigma=6, window=64, max_rewinds=5).problems() == []
    for config, field in (
        (GuardConfig(sigma=-1), "guard.sigma"),
        (GuardConfig(sigma=math.nan), "guard.sigma"),
        (GuardConfig(sigma=3, window=1), "guard.window"),
        (GuardConfig(window=9), "guard.window"),
        (GuardConfig(max_skips=3), "guard.max_skips"),
        (GuardConfig(policy="skip", max_rewinds=1), "guard.max_rewinds"),
        (GuardConfig(policy="rewind", max_rewinds=0), "guard.max_rewinds"),
    ):
        assert [problem.split(" ")[0] for problem in config.problems()] == [field]


CONFIGS = {
    "torch": OptimizerConfig(),
    "bfloat16": OptimizerConfig(state_dtype="bfloat16", state_rounding="stochastic", parameter_rounding="stochastic"),
    "int8": OptimizerConfig(state_dtype="int8"),
    "int4": OptimizerConfig(state_dtype="int4"),
    "muon": OptimizerConfig(name="muon", muon=MuonConfig(ns_dtype="float32")),
    "muon-bfloat16": OptimizerConfig(
        name="muon", state_dtype="bfloat16", groups=(ParamGroupConfig(roles=("norm",), lr_factor=0.5),)
    ),
}
ROLES = {"block": "block", "block.up": "colwise", "norm": "norm"}


class Model(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.block = nn.Module()
        self.block.up = nn.Linear(96, 70, bias=False)
        self.norm = nn.RMSNorm(96)
        self.to(dtype)
        with torch.no_grad():
            self.block.up.weight.copy_(torch.randn(70, 96, generator=torch.Generator().manual_seed(1)))

    def spread(self, mesh):
        for module in (self.block.up, self.norm):
            module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(0)]))
        return self


def give_gradients(model, step, value=None):
    for i, parameter in enumerate(model.parameters()):
        whole = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * step + i)).to(parameter.dtype)
        if value is not None:
            whole.fill_(value)
        spread = isinstance(parameter, DTensor)
        parameter.grad = distribute_tensor(whole, parameter.device_mesh, parameter.placements) if spread else whole


def snapshot(model, optimizer):
    tensors = dict(model.named_parameters()) | OptimizerState(optimizer, model).state_dict()
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors.items()}


def built(name, mesh=None):
    config = CONFIGS[name]
    model = Model(torch.bfloat16 if config.parameter_rounding == "stochastic" else torch.float32)
    model = model if mesh is None else model.spread(mesh)
    return model, build_optimizer(model, ROLES, config, seed=3)


def heeds(name, mesh=None):
    (model, optimizer), (plain_model, plain) = built(name, mesh), built(name, mesh)
    for step in (1, 2):
        give_gradients(model, step)
        step_unless(optimizer, torch.tensor(0.0), step)
        give_gradients(plain_model, step)
        step_unless(plain, None, step)
    before = snapshot(model, optimizer)
    assert all(torch.equal(tensor, before[n]) for n, tensor in snapshot(plain_model, plain).items())
    for value in (math.nan, math.inf, 1e30):
        give_gradients(model, 3, value)
        step_unless(optimizer, torch.tensor(1.0), 3)
        assert all(torch.equal(tensor, before[n]) for n, tensor in snapshot(model, optimizer).items())
    give_gradients(model, 4)
    step_unless(optimizer, torch.tensor(0.0), 4)
    give_gradients(plain_model, 4)
    step_unless(plain, None, 4)
    after = snapshot(model, optimizer)
    assert all(torch.equal(tensor, after[n]) for n, tensor in snapshot(plain_model, plain).items())
    return any(not torch.equal(tensor, before[n]) for n, tensor in after.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_that_is_not_taken_changes_no_bit(name):
    assert heeds(name)


def test_nor_does_it_on_sharded_parameters():
    def run():
        mesh = init_device_mesh("cpu", (2,))
        return [heeds(name, mesh) for name in CONFIGS]

    assert run_ranks(2, run) == [[True] * len(CONFIGS)] * 2


class ReadsToTheHost(TorchDispatchMode):
    """Counts what would make a host wait for its device."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CONFIGS)
def test_no_verdict_is_read_by_the_host(name):
    model, optimizer = built(name)
    guard = LossGuard(GuardConfig(sigma=3.0, window=2), CPU)
    for step in (1, 2, 3):
        give_gradients(model, step)
        with ReadsToTheHost() as mode:
            step_unless(optimizer, guard.judge(torch.tensor(1.0), torch.tensor(1.0)), step)
        assert mode.reads == 0
