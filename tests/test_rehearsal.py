"""A rehearsal on fake ranks and tensors against real ones: the same collectives, the same bytes."""

import dataclasses
import json

import pytest
from torch.profiler import ProfilerActivity, profile

from ranks import run_ranks
from titan_core.compat import trusted_pipeline_shapes
from titan_core.config import RematConfig
from titan_core.planning.memory_use import MemoryUse
from titan_models.shape import MoEConfig
from titan_train.environment import environment
from titan_train.forked import in_processes
from titan_train.rehearsal import Rehearsal, measured_step, rehearsable, rehearse, rehearse_all, rehearse_traffic
from training_runs import BF16, TINY, change, layout

SMALL = change(TINY, **{"training.seq_len": 16, "training.micro_batch_size": 1, "training.global_batch_size": 4})
MIXTURE = change(
    SMALL,
    **{"model.moe": MoEConfig(experts=4, top_k=2, hidden_dim=32, balance_loss=0.1), "data.confine_attention": False},
)
PP_SCHEDULES = ("GPipe", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "DualPipeV")


def pipeline(schedule):
    return 2, {**layout(pp=2, pp_schedule=schedule), "model.layers": 4}


LAYOUTS = {
    "one rank": (1, {}),
    "fsdp 2, gradients reduced last": (2, layout(grad_sync="last")),
    "hsdp 2x2, bfloat16": (4, {**layout(dp_replicate=2), "precision": BF16}),
    "tp 2 x fsdp 2, recomputed": (4, {**layout(tp=2), "remat": RematConfig(mode="full")}),
    "pp 2, ZBVZeroBubble": pipeline("ZBVZeroBubble"),
    "pp 2 x tp 2": (4, layout(pp=2, tp=2)),
}
OTHERS = {
    "cp 2, ring": (2, layout(cp=2)),
    "fsdp 2": (2, layout()),
    "never resharded": (2, layout(reshard_after_forward="never")),
    "tp 2, whole sequences": (2, layout(tp=2, sequence_parallel=False)),
    "cp 2, allgather": (2, layout(cp=2, cp_method="allgather")),
    "cp 2, ulysses": (2, layout(cp=2, cp_method="ulysses")),
    "muon": (2, {"optimizer.name": "muon"}),
    "pp 2 x tp 2 x fsdp 2": (8, layout(pp=2, tp=2)),
    **{f"pp 2, {name}": pipeline(name) for name in PP_SCHEDULES},
}


def real(config, world_size):
    """A measured step of each of so many real ranks."""

    def run():
        with environment(config) as env:
            # Without the stages' vote, which they hold once a run.
            return measured_step(rehearsable(config), env, tensors=trusted_pipeline_shapes())

    return [run()] if world_size == 1 else run_ranks(world_size, run)


def sometimes(names, *long):
    """Parameters, of which the `long` ones belong to the slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow if name in long else ()) for name in names]


@pytest.mark.parametrize("name", LAYOUTS)
def test_fake_ranks_send_and_hold_what_real_ones_do(name):
    check(*LAYOUTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_so_do_those_of_other_layouts(name):
    check(*OTHERS[name])


def check(world_size, changes):
    """Compares the first and the last rank, which differ most."""
    config = change(SMALL, **changes)
    ranks = sorted({0, world_size - 1})
    fake = in_processes(rehearse, [(config, world_size, rank) for rank in ranks])
    measured = real(config, world_size)
    for ours, rehearsal in zip([measured[rank] for rank in ranks], fake, strict=True):
        assert rehearsal.traffic == ours.traffic
        assert (world_size > 1) == bool(ours.traffic)
        for kind in ("parameters", "optimizer"):
            assert getattr(rehearsal.memory, kind) == getattr(ours.memory, kind)
        # Gloo lets go of what it sends a little later than fake ranks, which send at once.
        assert rehearsal.memory.total == pytest.approx(ours.memory.total, rel=0.1)


@pytest.mark.parametrize("degrees", [{"ep": 4, "tp": 2}])
def test_tokens_are_dealt_evenly_to_experts(degrees):
    config = change(MIXTURE, **layout(**degrees))
    fake = in_processes(rehearse, [(config, 4, rank) for rank in (0, 3)])
    for measured, rehearsal in zip(real(config, 4)[::3], fake, strict=True):
        ours, theirs = ({(f.axis, f.kind, f.cause): f for f in r.traffic} for r in (rehearsal, measured))
        assert ours.keys() == theirs.keys()
        for key, flow in ours.items():
            assert flow.count == theirs[key].count
            if key[1] != "all-to-all":
                assert flow == theirs[key]


def test_the_peak_is_what_the_profiler_sees(tmp_path):
    config = change(SMALL, **{"model.dim": 128, "training.seq_len": 64, "precision": BF16})
    with environment(config) as env, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        memory = measured_step(rehearsable(config), env).memory
    profiler.export_chrome_trace(str(tmp_path / "trace"))
    events = [e for e in json.loads((tmp_path / "trace").read_text())["traceEvents"] if e.get("name") == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]
        most = max(most, alive)
    assert memory.total == pytest.approx(most, rel=0.02)
    parameters = sum(p.numel() for p in config.model.build().parameters()) * 4
    assert memory.parameters == parameters
    assert memory.optimizer == pytest.approx(2 * parameters, rel=0.001)  # a step count for each parameter beside
    (rehearsal,) = in_processes(rehearse, [(config, 1, 0)])
    assert rehearsal.memory == memory


MANY = {
    "accumulation": (2, layout()),
    "accumulation, uneven": (1, {"training.micro_batch_size": 3}),
    "pp 2": (2, layout(pp=2)),
    "pp 2, GPipe": (2, layout(pp=2, pp_schedule="GPipe")),
    "pp 2, interleaved": pipeline("Interleaved1F1B"),
}


@pytest.mark.parametrize("name", sometimes(MANY, "accumulation", "pp 2", "pp 2, GPipe"))
def test_many_micro_batches_follow_from_a_few(name):
    world_size, changes = MANY[name]
    config = change(SMALL, **{"training.global_batch_size": 14, **changes})
    last = world_size - 1
    (whole,) = in_processes(rehearse, [(config, world_size, last)])
    (few,) = rehearse_all(config, world_size, [last])
    assert (few.memory, few.traffic) == (whole.memory, whole.traffic)


DEEP = {
    "fsdp 2 x tp 2, every other block recomputed": (4, {**layout(tp=2), "remat": RematConfig(mode="full", every=2)}),
    "ddp 2, gradients reduced last": (2, layout(dp_replicate=2, dp_shard=1, grad_sync="last")),
    "cp 2": (2, layout(cp=2)),
    "ep 2, the first two blocks dense": (
        4,
        {**layout(ep=2), "model.moe": dataclasses.replace(MIXTURE.model.moe, first_dense_layers=2)},
    ),
    "pp 2": (2, layout(pp=2)),
    "pp 2 x fsdp 2, always resharded": (
        4,
        {**layout(pp=2, reshard_after_forward="always"), "training.global_batch_size": 14},
    ),
    "muon": (2, {"optimizer.name": "muon"}),
}


LONG = (
    "fsdp 2 x tp 2, every other block recomputed",
    "muon",
    "pp 2",
    "ddp 2, gradients reduced last",
    "cp 2",
    "pp 2 x fsdp 2, always resharded",
)


@pytest.mark.parametrize("name", sometimes(DEEP, *LONG))
def test_the_traffic_of_many_blocks_follows_from_a_few(name):
    world_size, changes = DEEP[name]
    config = change(MIXTURE if name.startswith("ep") else SMALL, **{"model.layers": 10, **changes})
    (whole,) = in_processes(rehearse, [(config, world_size, 0)])
    assert rehearse_traffic(config, world_size, 0) == whole.traffic


REMAT = {
    "tp": (2, layout(tp=2)),
    "tp, whole sequences": (2, layout(tp=2, sequence_parallel=False)),
    "cp, allgather": (2, layout(cp=2, cp_method="allgather")),
    "cp, ulysses": (2, layout(cp=2, cp_method="ulysses")),
    "ep": (2, {**layout(ep=2), "model.moe": MIXTURE.model.moe}),
    "cp, ring": (2, layout(cp=2)),
}


@pytest.mark.parametrize("name", sometimes(REMAT, "tp, whole sequences", "cp, allgather", "cp, ulysses", "ep"))
def test_selective_recomputation_gathers_again_and_sends_nothing_else_twice(name):
    world_size, changes = REMAT[name]
    config = change(SMALL, **{"model.layers": 4, "training.seq_len": 32, **changes})
    modes = [RematConfig(), RematConfig(mode="selective"), RematConfig(mode="full")]
    tasks = [(change(config, remat=mode), world_size, 0, 1) for mode in modes]
    kept, selective, full = in_processes(rehearse, tasks)
    # Parameters are gathered again in any case.
    counts = [
        {(f.axis, f.kind): f.count for f in r.traffic if f.axis not in ("fsdp", "expert_fsdp")}
        for r in (kept, selective, full)
    ]
    for key, count in counts[1].items():
        again = key[1] in ("all-gather", "send", "receive")  # the latter two are the ring's
        assert count == counts[2 if again else 0][key], key
    assert counts[2] != counts[0]
    assert kept.memory.activations > selective.memory.activations > full.memory.activations


def test_the_traffic_of_long_pipelines_follows_from_few_micro_batches(monkeypatch):
    tasks = []

    def note(function, given, what):
        tasks.extend(given)
        return [Rehearsal(memory=MemoryUse(), host_memory=MemoryUse(), traffic=()) for _ in given]

    monkeypatch.setattr("titan_train.rehearsal.in_processes", note)
    for schedule in ("1F1B", "Interleaved1F1B"):
        deep = change(SMALL, **{"model.layers": 16, "training.global_batch_size": 64})
        rehearse_traffic(change(deep, **layout(pp=8, pp_schedule=schedule)), 8, 0)
    # What is sent is the same in every order, so one for which few micro-batches are enough stands in for 1F1B.
    assert [(task[0].parallel.pp_schedule, task[3]) for task in tasks] == [
        ("GPipe", 2),
        ("GPipe", 3),
        ("Interleaved1F1B", 24),
        ("Interleaved1F1B", 32),
    ]


def test_few_micro_batches_are_rehearsed_as_they_are(monkeypatch):
    counts = []

    def note(function, tasks, what):
        counts.extend(task[3] for task in tasks)
        return [Rehearsal(memory=MemoryUse(), host_memory=MemoryUse(), traffic=()) for _ in tasks]

    monkeypatch.setattr("titan_train.rehearsal.in_processes", note)
    for batch in (2, 8, 400):
        rehearse_all(change(SMALL, **{"training.global_batch_size": batch}), 1, [0])
    assert counts == [2, 2, 3, 2, 3]


def test_what_fake_tensors_cannot_do_is_left_out():
    config = change(TINY, **{"compile.enabled": True, "device": "auto", "remat": RematConfig(mode="budget")})
    ready = rehearsable(config)
    assert not ready.compile.enabled
    assert ready.remat.mode == "none"
    assert ready.model.loss_chunk_tokens == 2048
    assert rehearsable(change(config, device="cpu")).model.loss_chunk_tokens is None
    assert dataclasses.replace(ready.model, loss_chunk_tokens=None) == config.model


def test_what_is_offloaded_is_the_hosts():
    """Needs no GPU: FSDP is told to offload, and where that would be is counted."""
    config = change(SMALL, **{"model.dim": 128, "model.heads": 4, "model.head_dim": 32})
    offloading = change(config, **layout(cpu_offload=True))
    (plain, offloaded) = in_processes(rehearse, [(config, 2, 0), (offloading, 2, 0)])
    assert plain.host_memory == MemoryUse()
    host, device = offloaded.host_memory, offloaded.memory
    buffers = sum(b.numel() * b.itemsize for b in config.model.build().buffers())
    assert device.parameters == buffers
    assert host.parameters == plain.memory.parameters - buffers
    assert host.optimizer == plain.memory.optimizer
    assert host.gradients == pytest.approx(host.parameters, rel=0.05)
    assert device.optimizer == 0
    assert host.activations == host.communication == 0
    # On the device remains what a micro-batch needs: whole parameters of a unit, activations, gradients on their way.
    assert device.activations > 0
    assert device.communication > 0
    assert device.total < plain.memory.total - host.optimizer
