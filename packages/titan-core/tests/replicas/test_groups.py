"""Groups of real processes that are killed in the middle of steps, against one process that never was."""

import os
import signal
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ranks import run_ranks
from replica_processes import Progress, wait_until
from titan_core.clip import clip_gradients
from titan_core.optim import ModelState, OptimizerState
from titan_core.replicas import groups as replica_groups
from titan_core.replicas.config import ReplicaConfig
from titan_core.replicas.groups import ReplicaGroups, StepDiscardedError, buckets
from titan_core.shards import local

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
ROWS, WIDTH, STEPS = 12, 6, 12


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return inputs, inputs.sin().sum(1, keepdim=True)


def config(group, groups, address, **changes):
    settings = {"timeout_seconds": 20.0, "join_seconds": 20.0, "bucket_bytes": 256}
    return ReplicaConfig(groups=groups, group=group, lighthouse=address, host="localhost", **settings | changes)


def train(
    settings, *, steps=STEPS, fingerprint="same", during=lambda step: None, sharded=False, opened=None, device="cpu"
):
    """One rank of a group; the loss of each step that it has seen, the rows it has read, and its parameters."""
    ranks = dist.group.WORLD if dist.is_initialized() else None
    model, progress = build().to(device), Progress()
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        model.set_gradient_divide_factor(1.0)
        model.set_force_sum_reduction_for_comms(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    state = {"model": ModelState(model), "optimizer": OptimizerState(optimizer, model), "progress": progress}
    state["optimizer"].state_dict()  # creates it, so that healing finds it
    losses, rows, healed = {}, {}, []
    with ReplicaGroups(
        settings,
        state,
        position=lambda: progress.step,
        fingerprint=fingerprint,
        ranks=ranks,
        device=torch.device(device),
    ) as groups:
        if opened is not None:
            opened.touch()  # it lives, so the next quorum waits for it
        while progress.step < steps:
            groups.begin()
            if groups.healed:
                healed.append(progress.step)
            size = 1 if ranks is None else ranks.size()
            index = groups.rank * size + (0 if ranks is None else ranks.rank())
            inputs, targets = (rows.to(device) for rows in batch(progress.step))
            own = [row for row in range(ROWS) if row % (groups.number * size) == index]
            try:
                (count,) = groups.agree([len(own)])
            except StepDiscardedError:
                continue
            count *= size
            during(progress.step)
            loss = (model(inputs[own]) - targets[own]).square().sum() / count
            loss.backward()
            share = loss.detach().clone()
            groups.reduce([share, *(local(p.grad) for p in model.parameters())])
            if ranks is not None:
                dist.all_reduce(share)
            if not groups.commit():
                optimizer.zero_grad()
                continue
            clip_gradients(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.step += 1
            losses[progress.step], rows[progress.step] = share.item(), own
    parameters = {name: local(p).detach().cpu() for name, p in model.named_parameters()}
    return losses, rows, parameters, healed


def alone():
    """The same in one process, without groups."""
    model, losses = build(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for step in range(STEPS):
        inputs, targets = batch(step)
        loss = (model(inputs) - targets).square().sum() / ROWS
        loss.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, dict(model.named_parameters())


def killed_at(step):
    def during(now):
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return during


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_group_that_is_killed_in_a_step_comes_back_and_nothing_shows(tmp_path, address, start, count):
    def waits_at_eight(step):
        if step == 8:
            (tmp_path / "alone").touch()
            wait_until((tmp_path / "again").exists)
        time.sleep(0.1 * (step > 8))

    groups = [start(train, config(i, count, address), during=waits_at_eight) for i in range(count - 1)]
    killed = start(train, config(count - 1, count, address), during=killed_at(4))
    assert killed.wait() == -signal.SIGKILL
    wait_until((tmp_path / "alone").exists)
    again = start(train, config(count - 1, count, address), opened=tmp_path / "again")
    results = [group.result() for group in groups]
    late = again.result()
    expected, weights = alone()
    for losses, _, parameters, healed in results:
        assert list(losses.values()) == pytest.approx(expected, abs=1e-9)
        assert not healed
        for name, parameter in parameters.items():
            assert torch.allclose(parameter, weights[name], atol=1e-9, rtol=0), name
    for _, _, parameters, _ in (*results, late):
        assert all(torch.equal(parameters[name], results[0][2][name]) for name in parameters)
    assert len(late[3]) == 1
    assert late[3][0] > 8
    # Every step that was taken, that in which the group died too, was taken with each row once.
    for step in range(5, STEPS + 1):
        read = [row for result in (*results, late) for row in result[1].get(step, [])]
        assert sorted(read) == list(range(ROWS)), step


def test_ranks_of_a_group_heal_shard_by_shard_and_all_or_none(tmp_path, address, start):
    """Two groups of two ranks, one of which fails to fetch its part: the others must not go on with what they have."""

    def both_ranks(settings, **options):
        return run_ranks(2, train, settings, sharded=True, **options)

    def fails_once(settings, **options):
        from titan_core.replicas import manager

        fetch, calls = manager.Transport.recv_checkpoint, []

        def recv_checkpoint(self, *args, **kwargs):
            calls.append(None)
            if len(calls) == 1 and dist.get_rank() == 1:
                raise ConnectionError("the wire is cut")
            return fetch(self, *args, **kwargs)

        manager.Transport.recv_checkpoint = recv_checkpoint
        return (*train(settings, sharded=True, **options), len(calls))

    def waits_at_four(step):
        if step == 4:
            (tmp_path / "alone").touch()
            wait_until((tmp_path / "again").exists)
        time.sleep(0.1 * (step > 4))

    group = start(both_ranks, config(0, 2, address, join_seconds=0), during=waits_at_four)
    wait_until((tmp_path / "alone").exists)
    again = start(run_ranks, 2, fails_once, config(1, 2, address), opened=tmp_path / "again")
    first, late = group.result(), again.result()
    expected, _ = alone()
    for rank in (0, 1):
        losses, _, parameters, _ = first[rank]
        assert list(losses.values()) == pytest.approx(expected, abs=1e-9)
        assert all(torch.equal(parameters[name], late[rank][2][name]) for name in parameters)
        assert late[rank][4] == 2, "each rank has fetched twice"
    assert len(late[0][3]) == 1
    assert late[0][3][0] > 4


def test_a_group_of_another_experiment_is_refused_and_the_others_go_on(tmp_path, address, start):
    def slowly(step):
        if step == 4:
            (tmp_path / "running").touch()
        if step > 4:
            time.sleep(0.2)

    groups = [start(train, config(i, 3, address, join_seconds=0, min_groups=2), during=slowly) for i in range(2)]
    wait_until((tmp_path / "running").exists)
    stranger = start(train, config(2, 3, address), fingerprint="other")
    assert "another experiment or another layout" in stranger.error()
    for group in groups:
        assert list(group.result()[0].values()) == pytest.approx(alone()[0], abs=1e-9)


def test_no_step_is_taken_with_too_few_groups(tmp_path, address, start):
    first = start(train, config(0, 2, address, min_groups=2, join_seconds=0))
    time.sleep(1)
    assert first.wait_briefly() is None
    second = start(train, config(1, 2, address, min_groups=2, join_seconds=0))
    assert list(first.result()[0]) == list(second.result()[0]) == list(range(1, STEPS + 1))


def test_groups_that_start_wait_for_the_others_so_that_nobody_heals(tmp_path, address, start):
    first = start(train, config(0, 2, address))
    time.sleep(0.5)
    second = start(train, config(1, 2, address))
    for group in (first, second):
        losses, _, _, healed = group.result()
        assert list(losses) == list(range(1, STEPS + 1))
        assert not healed


def test_what_is_missing_is_named_with_its_remedy(start):
    def without_torchft():
        sys.modules["torchft"] = None
        train(config(0, 2, "http://localhost:1"))

    error = start(without_torchft).error()
    assert "torchft" in error
    (wanted,) = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]["torchft"]
    assert f"pip install '{wanted}'" in error

    def without_lighthouse():
        os.environ.pop("TORCHFT_LIGHTHOUSE", None)
        train(config(0, 2, None))

    assert "torchft_lighthouse --min_replicas 1" in start(without_lighthouse).error()

    assert "does not answer" in start(train, config(0, 2, "http://localhost:1", timeout_seconds=0.5)).error()


def test_what_never_succeeds_ends(address, start):
    def never():
        from titan_core.replicas import manager

        def configure(self, *args, **kwargs):
            raise ConnectionError("no way through")

        manager.Gloo.configure = configure
        replica_groups._MOST_FAILURES = 3
        train(config(0, 2, address, join_seconds=0))

    error = start(never).error()
    assert "in vain 3 times" in error
    assert "no way through" in error


def test_buckets_hold_neighbours_of_one_dtype():
    sizes = [3, 3, 9, 1, 1, 2]
    tensors = [torch.zeros(size) for size in sizes] + [torch.zeros(1, dtype=torch.float64)]
    found = [[tensor.numel() for tensor in bucket] for bucket in buckets(tensors, 6 * 4)]
    assert found == [[3, 3], [9], [1, 1, 2], [1]]
    assert list(buckets([], 10)) == []


@pytest.mark.gpu
def test_groups_on_gpus_go_on_over_nccl_when_one_is_killed(tmp_path, address, start):
    """One GPU for each group, since NCCL joins no two ranks on one; groups are forked before CUDA starts."""
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")

    def on_gpu(settings, **options):
        device = torch.device("cuda", settings.group)
        torch.cuda.set_device(device)
        return train(settings, device=device, **options)

    def waits_at_eight(step):
        if step == 8:
            (tmp_path / "alone").touch()
            wait_until((tmp_path / "again").exists, timeout=120)
        time.sleep(0.5 * (step > 8))

    left = start(on_gpu, config(0, 2, address), during=waits_at_eight)
    killed = start(on_gpu, config(1, 2, address), during=killed_at(4))
    assert killed.wait(120) == -signal.SIGKILL
    wait_until((tmp_path / "alone").exists, timeout=120)
    back = start(on_gpu, config(1, 2, address), opened=tmp_path / "again")
    first, late = left.result(240), back.result(240)
    assert list(first[0].values()) == pytest.approx(alone()[0], abs=1e-9)
    assert all(torch.equal(first[2][name], late[2][name]) for name in late[2])
    assert late[3]
