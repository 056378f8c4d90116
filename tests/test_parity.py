"""Every parallelism alone, and many together: one loss curve, one gradient for each parameter, the same weights.

Float64 settles what is rounding and what is a bug, so it is what runs by default; float32, longer, is in `slow`.
"""

import dataclasses
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from experiment import DENSE, MIXTURE, ROWS, Experiment, lay_out, merged, run, run_here
from ranks import run_ranks
from titan_core.config import CompileConfig, ParallelConfig, RematConfig
from titan_core.degrees import resolve_degrees

PP_SCHEDULES = (
    "GPipe",
    "1F1B",
    "Interleaved1F1B",
    "LoopedBFS",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
)


def layout(**degrees):
    return ParallelConfig(**degrees)


# Name -> number of ranks and layout; fsdp is what is left.
SINGLE = {
    "fsdp 2": (2, layout()),
    "fsdp 2, never resharded": (2, layout(reshard_after_forward="never")),
    "fsdp 2, gradients reduced last": (2, layout(grad_sync="last")),
    "ddp 2": (2, layout(dp_replicate=2)),
    "tp 2": (2, layout(tp=2)),
    "tp 2, whole sequences": (2, layout(tp=2, sequence_parallel=False)),
    "cp 2, ring": (2, layout(cp=2)),
    "cp 2, ring, unbalanced": (2, layout(cp=2, cp_load_balance=False)),
    "cp 2, allgather": (2, layout(cp=2, cp_method="allgather")),
    "cp 2, ulysses": (2, layout(cp=2, cp_method="ulysses")),
    **{f"pp 2, {name}": (2, layout(pp=2, pp_schedule=name)) for name in PP_SCHEDULES},
}
DENSE_TOGETHER = {
    "hsdp 2x2": (4, layout(dp_replicate=2)),
    "fsdp 4, resharded to 2": (4, layout(reshard_after_forward=2)),
    "fsdp 2 x tp 2": (4, layout(tp=2)),
    "fsdp 2 x tp 2, whole sequences": (4, layout(tp=2, sequence_parallel=False)),
    "ddp 2 x tp 2": (4, layout(dp_replicate=2, tp=2)),
    "fsdp 2 x cp 2, ring": (4, layout(cp=2)),
    "fsdp 2 x cp 2, allgather": (4, layout(cp=2, cp_method="allgather")),
    "cp 2 x tp 2, ring": (4, layout(cp=2, tp=2)),
    "pp 2 x tp 2": (4, layout(pp=2, tp=2)),
    "pp 2 x cp 2": (4, layout(pp=2, cp=2)),
    "pp 4": (4, layout(pp=4)),
    **{f"pp 2 x fsdp 2, {name}": (4, layout(pp=2, pp_schedule=name)) for name in PP_SCHEDULES},
    "pp 2 x fsdp 2, always resharded": (4, layout(pp=2, reshard_after_forward="always")),
    "pp 2 x ddp 2": (4, layout(pp=2, dp_replicate=2)),
    "hsdp 2x2 x tp 2": (8, layout(dp_replicate=2, tp=2)),
    "hsdp 2x2 x cp 2": (8, layout(dp_replicate=2, cp=2)),
    "fsdp 2 x tp 2 x pp 2": (8, layout(tp=2, pp=2)),
    "fsdp 2 x tp 2 x pp 2, zero bubble": (8, layout(tp=2, pp=2, pp_schedule="ZBVZeroBubble")),
    "fsdp 2 x cp 2 x tp 2": (8, layout(cp=2, tp=2)),
    "cp 2 x tp 2 x pp 2": (8, layout(cp=2, tp=2, pp=2)),
    "fsdp 2 x cp 2 x pp 2, ulysses": (8, layout(cp=2, pp=2, cp_method="ulysses")),
}
MIXTURES = {
    "fsdp 2": (2, layout()),
    "tp 2": (2, layout(tp=2)),
    "cp 2": (2, layout(cp=2)),
    "pp 2": (2, layout(pp=2)),
    "ep 2": (2, layout(ep=2)),
    "ep 4": (4, layout(ep=4)),
    "ep 2 x fsdp 2": (4, layout(ep=2)),
    "ep 2 x ddp 2": (4, layout(ep=2, dp_replicate=2)),
    "ep 2 x tp 2": (4, layout(ep=2, tp=2)),
    "ep over cp x tp": (4, layout(ep=4, cp=2, tp=2)),
    "pp 2 x ep 2": (4, layout(pp=2, ep=2)),
    "pp 2 x ep 2, zero bubble": (4, layout(pp=2, ep=2, pp_schedule="ZBVZeroBubble")),
    "ep 2 x fsdp 2 x tp 2": (8, layout(ep=2, tp=2)),
    "ep 4 x fsdp 2 x tp 2": (8, layout(ep=4, tp=2)),
    "ep 2 x pp 2 x tp 2": (8, layout(ep=2, pp=2, tp=2)),
    "hsdp 2x2 x cp 2 x ep 2": (8, layout(dp_replicate=2, cp=2, ep=2)),
}
CASES = [("dense", name) for name in SINGLE | DENSE_TOGETHER] + [("mixture", name) for name in MIXTURES]
MODELS = {"dense": (DENSE, SINGLE | DENSE_TOGETHER), "mixture": (MIXTURE, MIXTURES)}

FULL, SELECTIVE = RematConfig(mode="full"), RematConfig(mode="selective")
EVERY_SECOND = RematConfig(mode="full", every=2)
TRACED = CompileConfig(enabled=True, backend="aot_eager")
BUDGET = RematConfig(mode="budget", budget=0.3)
BLOCKS = [
    ("dense", "fsdp 2", {"remat": EVERY_SECOND}),
    ("dense", "fsdp 2", {"remat": SELECTIVE}),
    ("dense", "fsdp 2 x tp 2", {"remat": FULL}),
    ("dense", "fsdp 2 x cp 2, allgather", {"remat": SELECTIVE}),
    ("dense", "pp 2, ZBVZeroBubble", {"remat": FULL}),
    ("dense", "pp 2 x tp 2", {"remat": SELECTIVE}),
    ("mixture", "ep 2 x tp 2", {"remat": FULL}),
    ("mixture", "ep 2 x fsdp 2", {"remat": SELECTIVE}),
    ("dense", "fsdp 2", {"compiling": TRACED, "remat": BUDGET}),
    ("dense", "pp 2, 1F1B", {"compiling": TRACED}),
    ("mixture", "ep 2", {"compiling": TRACED}),
]
BLOCKS += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (
        ("dense", "fsdp 2 x cp 2, ring", {"remat": SELECTIVE}),
        ("dense", "tp 2, whole sequences", {"remat": SELECTIVE}),
        ("dense", "fsdp 2", {"compiling": TRACED, "remat": FULL}),
        ("dense", "tp 2", {"compiling": TRACED, "remat": BUDGET}),
        ("dense", "fsdp 2 x tp 2", {"compiling": TRACED, "remat": SELECTIVE}),
        ("dense", "cp 2, ring", {"compiling": TRACED}),
    )
]
# The compiler's own warnings, at every autograd function and every gathered parameter it meets.
ignore_compiler_warnings = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning"
)


@pytest.fixture(scope="module")
def alone():
    """What one process gets, by experiment; computed once."""
    known = {}

    def get(experiment):
        key = pickle.dumps(experiment)
        if key not in known:
            known[key] = run(experiment)
        return known[key]

    return get


def relative(ours, theirs):
    """The greatest difference, relative to the greatest value."""
    return np.abs(np.subtract(ours, theirs)).max() / np.abs(theirs).max()


def compare(ours, expected, *, curve, gradient, parameter):
    """Every number by itself: the curve relative a step, gradients relative to each parameter's greatest."""
    for key in ("losses", "norms", "evaluation"):
        differences = np.abs(np.subtract(getattr(ours, key), getattr(expected, key))) / np.abs(getattr(expected, key))
        assert differences.max() <= curve, f"{key} differ by {differences}"
    assert ours.gradients.keys() == expected.gradients.keys()
    for name, own in expected.gradients.items():
        assert np.abs(own).max() > 0, f"{name} has no gradient to compare"
        assert relative(ours.gradients[name], own) <= gradient, f"the gradient of {name} differs"
    assert ours.parameters.keys() == expected.parameters.keys()
    for name, own in expected.parameters.items():
        assert np.abs(ours.parameters[name] - own).max() <= parameter, f"{name} differs"
    assert ours.loads.keys() == expected.loads.keys()
    for name, own in expected.loads.items():
        assert np.array_equal(ours.loads[name], own), f"the load of {name} differs"


def tried(model, name, **fields):
    """The experiment that tries a layout: no more blocks than its stages ask for."""
    config, layouts = MODELS[model]
    return Experiment(model=dataclasses.replace(config, layers=4 if layouts[name][1].pp > 1 else 2), **fields)


def accumulating(experiment, world_size, config):
    """The experiment with micro-batches as large as leave a rank two of them, or a pipeline four."""
    degrees = resolve_degrees(config, world_size)
    return dataclasses.replace(experiment, micro_batch_size=ROWS // degrees.dp // (4 if degrees.pp > 1 else 2))


@pytest.mark.parametrize(("model", "name"), CASES)
def test_a_layout_changes_nothing(alone, model, name):
    experiment, where = tried(model, name), MODELS[model][1][name]
    ours = run(accumulating(experiment, *where), *where)
    compare(ours, alone(experiment), curve=1e-9, gradient=1e-9, parameter=1e-9)


def test_the_readme_counts_right():
    together = [name for model, name in CASES if MODELS[model][1][name][0] >= 4]
    assert f"{len(together)} combinations on 4 and 8 ranks" in (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture(scope="module")
def compiler():
    """Imported here, once, and not by every rank."""
    torch.compile(torch.sin, backend="aot_eager")(torch.ones(2, requires_grad=True)).sum().backward()


@ignore_compiler_warnings
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("model", "name", "options"), BLOCKS)
def test_neither_does_recomputing_or_compiling(alone, model, name, options):
    experiment, where = tried(model, name, steps=2), MODELS[model][1][name]
    ours = run(accumulating(experiment, *where), *where, **options)
    compare(ours, alone(experiment), curve=1e-9, gradient=1e-9, parameter=1e-9)


def test_a_schedule_from_a_file(alone, tmp_path):
    """Two ranks, four micro-batches each in flight before the first comes back."""
    forward, backward = [[f"{stage}{kind}{i}" for i in range(8)] for stage, kind in ((0, "F"), (0, "B"))]
    second = [f"1{kind}{i}" for i in range(8) for kind in "FB"]
    first = (
        forward[:4] + [action for pair in zip(backward[:4], forward[4:], strict=True) for action in pair] + backward[4:]
    )
    path = tmp_path / "schedule.csv"
    path.write_text("\n".join(",".join(row) for row in (first, second)) + "\n")
    experiment = Experiment()
    ours = run(experiment, 2, layout(pp=2, pp_schedule_csv=str(path)))
    compare(ours, alone(experiment), curve=1e-9, gradient=1e-9, parameter=1e-9)


def test_stages_given_by_name(alone):
    experiment = Experiment(steps=2)
    ours = run(experiment, 2, layout(pp=2, pp_split=("layers.1",)))
    compare(ours, alone(experiment), curve=1e-9, gradient=1e-9, parameter=1e-9)


def test_a_block_with_experts_gathers_its_neighbours_early():
    """Its host waits for counts before it can send, so what FSDP would start by itself comes too late."""

    def prefetched():
        laid_out, _ = lay_out(Experiment(model=MIXTURE), 2, layout(ep=2), RematConfig(), CompileConfig())
        states = [block._get_fsdp_state() for block in laid_out.model.layers.values()]
        return {
            "forward": [len(state._states_to_forward_prefetch) for state in states],
            "backward": [len(state._states_to_backward_prefetch) for state in states],
        }

    # The first block is dense, the last has none to follow.
    assert run_ranks(2, prefetched) == [{"forward": [0, 1, 1, 0], "backward": [0, 1, 1, 1]}] * 2


@ignore_compiler_warnings
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", ["fsdp 2", "fsdp 2 x tp 2"])
def test_equal_blocks_are_compiled_once(alone, name):
    """Two blocks, one region to train and one to evaluate: FSDP and tensor parallelism do not make them differ."""
    experiment, (world_size, config) = tried("dense", name, steps=2), MODELS["dense"][1][name]

    def outcome_and_count():
        counter = CompileCounterWithBackend("aot_eager")
        options = CompileConfig(enabled=True, backend=counter)
        outcome = run_here(accumulating(experiment, world_size, config), world_size, config, RematConfig(), options)
        return outcome, counter.frame_count

    outcomes, counts = zip(*run_ranks(world_size, outcome_and_count), strict=True)
    assert counts == (2,) * world_size
    compare(merged(outcomes), alone(experiment), curve=1e-9, gradient=1e-9, parameter=1e-9)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler, c++")
@pytest.mark.filterwarnings("ignore")  # inductor imports what torch itself deprecates
@pytest.mark.parametrize(
    ("model", "name"),
    [("dense", "fsdp 2"), ("dense", "fsdp 2 x tp 2"), ("dense", "cp 2, allgather"), ("mixture", "ep 2")],
)
def test_inductor(alone, model, name):
    config, layouts = MODELS[model]
    experiment = Experiment(model=config, dtype=torch.float32)
    ours = run(experiment, *layouts[name], compiling=CompileConfig(enabled=True))
    compare(ours, alone(experiment), curve=1e-4, gradient=1e-3, parameter=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "name"), CASES)
def test_float32_curves(alone, model, name):
    config, layouts = MODELS[model]
    experiment = Experiment(model=config, steps=10, dtype=torch.float32)
    compare(run(experiment, *layouts[name]), alone(experiment), curve=1e-5, gradient=1e-4, parameter=1e-6)
