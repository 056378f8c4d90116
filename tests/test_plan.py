"""`titan-plan` against the dry run, which rehearses the real code, and against live tensors of real ranks."""

import dataclasses
import json
import resource
import subprocess
import sys
import time

import pytest

from ranks import run_ranks
from titan_core.compat import trusted_pipeline_shapes
from titan_core.config import ParallelConfig, RematConfig
from titan_core.degrees import resolve_degrees
from titan_models.shape import MoEConfig
from titan_quant.config import LoRAConfig, MixedPrecision
from titan_train.configs.llama3 import llama3_8b
from titan_train.environment import environment
from titan_train.plan import plan, plans_by_remat
from titan_train.plan_fit import fit
from titan_train.rehearsal import measured_step, rehearsable, rehearse_all
from titan_train.validate import validate
from training_runs import BF16, TINY, change, layout

# Large enough that what is counted is not lost among scalars.
SMALL = change(
    TINY,
    **{
        "data.confine_attention": False,
        "model.vocab_size": 2000,
        "model.dim": 128,
        "model.layers": 2,
        "model.heads": 8,
        "model.kv_heads": 4,
        "model.head_dim": 16,
        "model.hidden_dim": 384,
        "model.loss_chunk_tokens": 64,
        "training.seq_len": 256,
        "training.global_batch_size": 8,
        "training.micro_batch_size": 1,
    },
)
MOE = MoEConfig(experts=8, top_k=2, hidden_dim=128, balance_loss=0.1)
HALF = {"precision": BF16}
EXPERTS = {"model.moe": MOE}
FULL, SELECTIVE = {"remat": RematConfig(mode="full")}, {"remat": RematConfig(mode="selective")}
DEEP = {"model.layers": 4}
LORA = {"lora": LoRAConfig(rank=8)}

CASES = {
    "bfloat16, recomputed": (1, {**HALF, **FULL, "training.micro_batch_size": 2}),
    "selective": (1, SELECTIVE),
    "8-bit states, tied embeddings": (1, {"optimizer.state_dtype": "int8", "model.tie_embeddings": True}),
    "bfloat16 states and weights": (
        1,
        {"precision": MixedPrecision(master_dtype="bfloat16"), "optimizer.state_dtype": "bfloat16"},
    ),
    "adapters": (1, {**LORA, **HALF}),
    "experts": (1, {**EXPERTS, **HALF}),
    "fsdp 4, recomputed": (4, {**layout(), **HALF, **FULL}),
    "tp 2 x fsdp 2, selective": (4, {**layout(tp=2), **HALF, **SELECTIVE}),
    "cp 2": (2, {**layout(cp=2), **HALF, **FULL}),
    "ep 4": (4, {**layout(ep=4), **EXPERTS, **HALF}),
    "pp 2, GPipe": (2, {**layout(pp=2, pp_schedule="GPipe"), **HALF, "training.global_batch_size": 4}),
}
MORE = {
    "one device": (1, {}),
    "documents": (1, {**HALF, "data.confine_attention": True}),
    "fsdp 2, tied": (2, {**layout(), **HALF, "model.tie_embeddings": True}),
    "hsdp 2x2": (4, {**layout(dp_replicate=2), **HALF}),
    "ddp 2": (2, {**layout(dp_replicate=2, dp_shard=1), **HALF}),
    "every other block recomputed": (1, {"remat": RematConfig(mode="full", every=2)}),
    "normalised heads": (1, {**HALF, "model.qk_norm": True}),
    "4-bit states": (1, {**HALF, "optimizer.state_dtype": "int4"}),
    "experts, recomputed": (1, {**EXPERTS, **HALF, **FULL}),
    "experts, selective": (1, {**EXPERTS, **HALF, **SELECTIVE}),
    "experts in float32": (1, EXPERTS),
    "adapters on some layers": (1, {"lora": LoRAConfig(rank=8, roles=("colwise",)), **FULL}),
    "fsdp 2": (2, layout()),
    "fsdp 2, never freed": (2, layout(reshard_after_forward="never")),
    "fsdp 2, always freed": (2, {**layout(reshard_after_forward="always"), **HALF}),
    "fsdp 2, reduced last": (2, layout(grad_sync="last")),
    "fsdp 2, reduced last, bfloat16": (2, {**layout(grad_sync="last"), **HALF}),
    "fsdp 2, adapters": (2, {**layout(), **LORA, **HALF}),
    "fsdp 2, 8-bit states": (2, {**layout(), "optimizer.state_dtype": "int8"}),
    "fsdp 2, experts": (2, {**layout(), **EXPERTS, **HALF}),
    "hsdp 2x2, reduced every time": (4, layout(dp_replicate=2, grad_sync="every")),
    "ddp 2, float32": (2, layout(dp_replicate=2, dp_shard=1)),
    "tp 2": (2, {**layout(tp=2), **HALF}),
    "tp 2, whole sequences": (2, {**layout(tp=2, sequence_parallel=False), **HALF}),
    "tp 2, adapters": (2, {**layout(tp=2), **LORA, **HALF}),
    "tp 2, shared experts": (
        2,
        {**layout(tp=2), **HALF, "model.moe": dataclasses.replace(MOE, shared_hidden_dim=128, first_dense_layers=1)},
    ),
    "cp 2, documents": (2, {**layout(cp=2), **HALF, "data.confine_attention": True}),
    "cp 4 x tp 2": (8, {**layout(cp=4, tp=2), **HALF}),
    "ep 4, recomputed": (4, {**layout(ep=4), **EXPERTS, **HALF, **FULL}),
    "ep 4 x tp 2": (4, {**layout(ep=4, tp=2), **EXPERTS, **HALF}),
    "pp 2": (2, layout(pp=2)),
    "pp 4": (4, {**layout(pp=4), **HALF, **DEEP}),
    "pp 2, interleaved, fsdp 2": (
        4,
        {**layout(pp=2, pp_schedule="Interleaved1F1B"), **HALF, **DEEP, "training.global_batch_size": 16},
    ),
    "pp 2, breadth first": (2, {**layout(pp=2, pp_schedule="LoopedBFS"), **DEEP}),
    "pp 2 x fsdp 2, recomputed": (
        4,
        {**layout(pp=2), **HALF, **FULL, "training.global_batch_size": 16},
    ),
    "pp 2 x fsdp 2, always freed": (4, {**layout(pp=2, reshard_after_forward="always"), **HALF}),
    "pp 2 x tp 2": (4, {**layout(pp=2, tp=2), **HALF}),
    "pp 2, adapters": (2, {**layout(pp=2), **LORA, **HALF}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_that_of_the_dry_run(name):
    compare(*CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_so_is_that_of_other_layouts(name):
    compare(*MORE[name])


def compare(world_size, changes):
    """Each pipeline rank within 5 %; parameters and optimizer states of the heaviest one exactly."""
    config = change(SMALL, **changes)
    validate(config, world_size)
    planned = plan(config, world_size)
    firsts = [rank * (world_size // config.parallel.pp) for rank in range(config.parallel.pp)]
    rehearsed = [rehearsal.memory for rehearsal in rehearse_all(config, world_size, firsts)]
    assert planned.by_pipeline_rank == pytest.approx([memory.total for memory in rehearsed], rel=0.05)
    heaviest = rehearsed[planned.pipeline_rank]
    assert heaviest.total >= 0.99 * max(memory.total for memory in rehearsed)
    assert planned.memory["parameters"] == heaviest.parameters
    assert planned.memory["optimizer"] == heaviest.optimizer


@pytest.mark.slow
def test_the_peak_of_an_8b_model_is_that_of_the_dry_run():
    config = change(llama3_8b(), **{"remat.mode": "full", "training.global_batch_size": 128, **layout(tp=2)})
    compare_large(config, 64)
    compare_large(change(config, **layout(pp=4), **{"optimizer.state_dtype": "bfloat16"}), 64)


def compare_large(config, world_size):
    validate(config, world_size)
    planned = plan(config, world_size)
    rank = planned.pipeline_rank * (world_size // config.parallel.pp)
    (rehearsal,) = rehearse_all(config, world_size, [rank])
    assert planned.peak == pytest.approx(rehearsal.memory.total, rel=0.05)


LIVE = {
    "one device": (1, HALF),
    "one device, recomputed, 8-bit states": (1, {**FULL, "optimizer.state_dtype": "int8"}),
    "fsdp 2": (2, {**layout(), **HALF}),
    "fsdp 2 x tp 2, recomputed": (4, {**layout(tp=2), **HALF, **FULL}),
    "pp 2": (2, {**layout(pp=2), **HALF}),
}


@pytest.mark.parametrize("name", LIVE)
def test_real_ranks_hold_as_much(name):
    world_size, changes = LIVE[name]
    config = change(SMALL, **changes)
    planned = plan(config, world_size)

    def run():
        with environment(config) as env:
            return measured_step(rehearsable(config), env, tensors=trusted_pipeline_shapes()).memory

    measured = [run()] if world_size == 1 else run_ranks(world_size, run)
    heaviest = measured[planned.pipeline_rank * (world_size // config.parallel.pp)]
    assert planned.peak == pytest.approx(heaviest.total, rel=0.1)


GROWTH = """
import re, sys
from pathlib import Path
from titan_train.config_file import read_config
from titan_train.environment import environment
from titan_train.rehearsal import measured_step, rehearsable

def peak():  # ru_maxrss also counts the process that has started this one
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

config = read_config(Path(sys.argv[1]))
before = peak()
with environment(config) as env:
    measured_step(rehearsable(config), env)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_a_process_grows_as_much(tmp_path):
    """A state of more than a gigabyte: what the process needs beside is small then."""
    from titan_train.config_file import to_json

    shape = {"model.dim": 1024, "model.layers": 6, "model.heads": 16, "model.kv_heads": 16, "model.head_dim": 64}
    config = change(SMALL, **shape, **{"model.hidden_dim": 4096, "training.global_batch_size": 2})
    planned = plan(config, 1)
    assert sum(planned.memory[kind] for kind in ("parameters", "optimizer")) > 2**30
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    done = subprocess.run([sys.executable, "-c", GROWTH, str(path)], capture_output=True, text=True, check=True)
    assert planned.peak == pytest.approx(int(done.stdout), rel=0.2)


def test_405b_on_16384_gpus_takes_less_than_a_second_and_no_torch():
    flags = "--config llama3_405b --world-size 16384 --parallel.tp 8 --parallel.pp 16 --json"
    code = (
        "import sys; from titan_train.plan_cli import run; code = run(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *flags.split()], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"titan-plan for 405B on 16,384 ranks: {seconds:.2f} s of processor time")
    found = json.loads(done.stdout)
    assert found["layout"] == {"pp": 16, "dp_replicate": 1, "dp_shard": 128, "cp": 1, "tp": 8, "ep": 1}
    assert len(found["by_pipeline_rank"]) == 16
    assert seconds < 4  # of which the arithmetic has the smaller part

    from titan_train.configs.llama3 import llama3_405b

    started = time.process_time()
    plan(dataclasses.replace(llama3_405b(), parallel=ParallelConfig(tp=8, pp=16)), 16384)
    assert time.process_time() - started < 1


def test_modes_of_recomputation_are_compared():
    found = plans_by_remat(change(SMALL, **HALF), 1)
    activations = {mode: planned.memory["activations"] for mode, planned in found.items()}
    assert list(found) == ["none", "selective", "full, every 2", "full"]
    assert activations["none"] > activations["selective"] > activations["full"]
    assert activations["none"] > activations["full, every 2"] > activations["full"]


@pytest.mark.slow
def test_layouts_that_are_said_to_fit_do():
    """Sampled: the dry run of the first and the last that fits, and of the largest that does not."""
    config = change(SMALL, **HALF, **{"training.global_batch_size": 4})
    memory = int(plan(change(config, **layout(tp=2), **FULL), 4).total * 1.05)
    found = fit(config, 4, memory)
    assert 0 < len(found.fitting) < found.tried
    for candidate in {id(c): c for c in (found.fitting[0], found.fitting[-1])}.values():
        assert dry_total(candidate.config) <= memory
    fitting = {(c.config.parallel, c.config.remat) for c in found.fitting}
    without = change(config, **layout())
    assert (without.parallel, without.remat) not in fitting
    assert dry_total(without) * 1.05 > memory
    degrees = [(c.plan.degrees.tp, c.plan.degrees.pp) for c in found.fitting]
    assert degrees == sorted(degrees)
    assert all(resolve_degrees(c.config.parallel, 4).world_size == 4 for c in found.fitting)


def dry_total(config):
    firsts = [rank * (4 // config.parallel.pp) for rank in range(config.parallel.pp)]
    return max(rehearsal.memory.total for rehearsal in rehearse_all(config, 4, firsts))
