"""Groups that meet now and then, as real processes, against the same arithmetic done by one."""

import copy
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ranks import run_ranks
from replica_processes import Progress, wait_until
from titan_core.optim import ModelState, OptimizerState
from titan_core.replicas.averaging import Averaging, cut_into_fragments
from titan_core.replicas.config import AveragingConfig, ReplicaConfig
from titan_core.replicas.groups import ReplicaGroups
from titan_core.shards import local

WIDTH, STEPS, GROUPS = 6, 8, 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, 8).double(), nn.Linear(8, 1).double()
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float64))

    def forward(self, inputs):
        if self.training:
            self.seen += inputs[:2, 0]
        return self.second(self.first(inputs).tanh())


def batch(step, group):
    generator = torch.Generator().manual_seed(100 * step + group)
    inputs = torch.randn(4, WIDTH, generator=generator, dtype=torch.float64)
    return inputs, inputs.sin().sum(1, keepdim=True)


def inner_step(model, optimizer, step, group):
    inputs, targets = batch(step, group)
    loss = (model(inputs) - targets).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def inner_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def train(address, group, config, *, optimizer=inner_optimizer, after=lambda step: None, joining=None, sharded=False):
    """One rank of a group: its weights after each step."""
    model, progress = Model(), Progress()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        model.set_gradient_divide_factor(1.0)
        model.set_force_sum_reduction_for_comms(True)
    optimizer = optimizer(model)
    moments = OptimizerState(optimizer, model)
    moments.state_dict()
    averaging = Averaging(model, config, sizes, step=lambda: progress.step, moments=moments)
    settings = ReplicaConfig(
        groups=GROUPS,
        group=group,
        lighthouse=address,
        host="localhost",
        timeout_seconds=20.0,
        join_seconds=20.0,
        averaging=config,
    )
    state = {"model": ModelState(model), "averaging": averaging, "progress": progress}
    ranks, history = dist.group.WORLD if dist.is_initialized() else None, {}
    with ReplicaGroups(
        settings, state, position=averaging.position, fingerprint="", ranks=ranks, device=torch.device("cpu")
    ) as groups:
        if joining is not None:
            joining.touch()
        averaging.begin(groups)
        while progress.step < STEPS:
            if sharded:  # each rank has half of the rows
                inputs, targets = (rows.chunk(2)[dist.get_rank()] for rows in batch(progress.step, group))
                ((model(inputs) - targets).square().sum() / 4).backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                inner_step(model, optimizer, progress.step, group)
            progress.step += 1
            averaging.end_step(groups)
            history[progress.step] = {name: local(t).detach().clone() for name, t in model.state_dict().items()}
            after(progress.step)
        history[progress.step] = {name: local(t).detach().clone() for name, t in model.state_dict().items()}
    return history


def reference(config, optimizer=inner_optimizer):
    """The same by one process, with torch's SGD as the outer optimizer; each group's weights after each step."""
    models = [Model() for _ in range(GROUPS)]
    inner = [optimizer(model) for model in models]
    anchor = copy.deepcopy(models[0])
    fragments = cut_into_fragments({n: p.numel() for n, p in anchor.named_parameters()}, config.fragments)
    parts = [[n for n, _ in anchor.named_parameters() if fragments[n] == i] for i in range(config.fragments)]
    outer = [
        torch.optim.SGD(
            [anchor.get_parameter(name) for name in part],
            lr=config.outer_lr,
            momentum=config.outer_momentum,
            nesterov=config.nesterov and config.outer_momentum > 0,
        )
        for part in parts
    ]
    history = [{} for _ in models]
    for step in range(1, STEPS + 1):
        for group, model in enumerate(models):
            inner_step(model, inner[group], step - 1, group)
        if step % config.interval == 0:
            which = (step // config.interval - 1) % config.fragments
            meet(models, anchor, parts[which], outer[which] if config.method == "diloco" else None)
        for group, model in enumerate(models):
            history[group][step] = {name: t.clone() for name, t in model.state_dict().items()}
    return history


@torch.no_grad()
def meet(models, anchor, names, outer):
    """Brings the parameters of these names together, and all buffers."""
    means = {name: sum(model.get_parameter(name) for model in models) / len(models) for name in names}
    if outer is not None:
        for name in names:
            anchor.get_parameter(name).grad = anchor.get_parameter(name) - means[name]
        outer.step()
        means = {name: anchor.get_parameter(name) for name in names}
    seen = sum(model.seen for model in models) / len(models)
    for model in models:
        model.seen.copy_(seen)
        for name in names:
            model.get_parameter(name).copy_(means[name])


def assert_same(found, expected, **tolerance):
    for step, weights in found.items():
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[step][name], **tolerance, msg=f"{name} after step {step}")


CLOSE = {"atol": 1e-12, "rtol": 0.0}
METHODS = {
    "local SGD": AveragingConfig(method="local_sgd", every=4),
    "DiLoCo": AveragingConfig(method="diloco", every=4),
    "DiLoCo by fragments, without looking ahead": AveragingConfig(
        method="diloco", every=4, fragments=2, nesterov=False
    ),
}


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_groups_compute_what_one_process_would_for_them(address, start, config):
    groups = [start(train, address, group, config) for group in range(GROUPS)]
    found, expected = [group.result() for group in groups], reference(config)
    for group in range(GROUPS):
        assert_same(found[group], expected[group], **CLOSE)
    for step in range(1, STEPS + 1):
        met = step % config.every == 0 and config.fragments == 1
        same = all(torch.equal(found[0][step][name], found[1][step][name]) for name in found[0][step])
        assert same == met, step


def test_diloco_of_one_sgd_step_and_no_outer_momentum_is_training_on_the_whole_batch(address, start):
    """Averages of weights after a step of SGD are a step of SGD by the average gradient."""

    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    config = AveragingConfig(method="diloco", every=1, outer_lr=1.0, outer_momentum=0.0)
    groups = [start(train, address, group, config, optimizer=sgd) for group in range(GROUPS)]
    model = Model()
    optimizer, expected = sgd(model), {}
    for step in range(STEPS):
        for group in range(GROUPS):
            inputs, targets = batch(step, group)
            ((model(inputs) - targets).square().mean() / GROUPS).backward()
        optimizer.step()
        optimizer.zero_grad()
        expected[step + 1] = {name: p.detach().clone() for name, p in model.named_parameters()}
    for group in groups:
        found = {step: {name: weights[name] for name in expected[step]} for step, weights in group.result().items()}
        assert_same(found, expected, **CLOSE)


def test_sharded_groups_average_their_shards(tmp_path, address, start):
    config = METHODS["DiLoCo"]
    groups = [start(run_ranks, 2, train, address, group, config, sharded=True) for group in range(GROUPS)]
    expected = reference(config)
    for group, running in enumerate(groups):
        found = running.result()
        for step in range(1, STEPS + 1):
            for name, weight in expected[group][step].items():
                if name == "seen":  # of which each rank has its own
                    continue
                whole = torch.cat([ranks[step][name] for ranks in found])
                torch.testing.assert_close(whole, weight, **CLOSE)


@pytest.mark.parametrize("method", [pytest.param("local SGD", marks=pytest.mark.slow), "DiLoCo"])
def test_a_group_that_comes_back_takes_the_average_without_adding_to_it(tmp_path, address, start, method):
    """The one that is left is alone at the first meeting; the other heals at the second, and so is where it is."""
    alone, again = tmp_path / "alone", tmp_path / "again"

    def wait(step):
        if step == 4:
            alone.touch()
            wait_until(again.exists)
            time.sleep(1)

    def die(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    config = METHODS[method]
    left = start(train, address, 0, config, after=wait)
    killed = start(train, address, 1, config, after=die)
    assert killed.wait() == -signal.SIGKILL
    wait_until(alone.exists)
    back = start(train, address, 1, config, joining=again)
    found = left.result()
    assert_same(back.result(), {STEPS: found[STEPS]}, atol=0, rtol=0)  # it has healed at the last step
    solo = {}
    model, progress = Model(), Progress()
    optimizer = inner_optimizer(model)
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    momentum = {name: torch.zeros_like(p) for name, p in anchor.items()}
    for progress.step in range(1, STEPS + 1):
        inner_step(model, optimizer, progress.step - 1, 0)
        if progress.step % config.every == 0 and config.method == "diloco":
            with torch.no_grad():
                for name, p in model.named_parameters():
                    momentum[name] = 0.9 * momentum[name] + anchor[name] - p
                    anchor[name] -= 0.7 * (anchor[name] - p + 0.9 * momentum[name])
                    p.copy_(anchor[name])
        solo[progress.step] = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert_same({step: {n: w for n, w in weights.items() if n != "seen"} for step, weights in found.items()}, solo)


def test_a_state_goes_into_another_averaging_and_the_position_with_it():
    model, progress = Model(), Progress()
    moments = OptimizerState(inner_optimizer(model), model)
    sizes = {name: p.numel() for name, p in model.named_parameters()}

    def build():
        return Averaging(model, METHODS["DiLoCo"], sizes, step=lambda: progress.step, moments=moments)

    first, second = build(), build()
    state = {name: t + 1 if isinstance(t, torch.Tensor) else 4 for name, t in first.state_dict().items()}
    second.load_state_dict(state)
    assert state.keys() == second.state_dict().keys()
    assert all(torch.equal(second.state_dict()[n], t) for n, t in state.items() if isinstance(t, torch.Tensor))
    progress.step = 4
    assert (first.position(), second.position()) == (8, 9)
    progress.step = 5
    assert first.position() == second.position() == 10


def test_fragments_are_neighbours_of_about_equal_size():
    sizes = {"a": 10, "b": 10, "c": 20, "d": 40}
    assert cut_into_fragments(sizes, 2) == {"a": 0, "b": 0, "c": 0, "d": 1}
    assert set(cut_into_fragments(sizes, 1).values()) == {0}
