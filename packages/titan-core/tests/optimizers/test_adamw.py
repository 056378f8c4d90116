"""AdamW with moments in few bytes: against torch's, on every layout against one process, and through checkpoints."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ranks import run_ranks
from titan_core.config import OptimizerConfig, ParallelConfig
from titan_core.degrees import resolve_degrees
from titan_core.init import init_parameters, materialize
from titan_core.mesh import build_meshes, data_rank, sum_over
from titan_core.optim import OptimizerState, build_optimizer
from titan_core.optimizers import moments
from titan_core.optimizers.adamw import AdamW
from titan_core.parallelize import parallelize
from titan_core.roles import resolve_roles

STEPS, SEED = 3, 7
CONFIGS = {
    "float32": OptimizerConfig(),
    "bfloat16": OptimizerConfig(state_dtype="bfloat16"),
    "bfloat16-stochastic": OptimizerConfig(state_dtype="bfloat16", state_rounding="stochastic"),
    "int8": OptimizerConfig(state_dtype="int8"),
    "int4": OptimizerConfig(state_dtype="int4"),
}
# Rows of 300 are two blocks of 150 in 8 bits, three of 100 in 4.
SHAPES = {"matrix": (37, 300), "experts": (4, 10, 150), "vector": (51,), "small": (5, 7)}


def gaussian(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stepped(config, spread=lambda name, tensor: tensor, *, dtype=torch.float32, steps=STEPS, on_host=False):
    """Parameters and optimizer after some steps, the same whole gradients on every layout."""
    parameters = {n: nn.Parameter(spread(n, gaussian(shape, i, dtype))) for i, (n, shape) in enumerate(SHAPES.items())}
    group = {"params": list(parameters.items()), "lr": 1e-2, "weight_decay": 0.1}
    optimizer = AdamW([group], config, seed=SEED, on_host=on_host)
    take_steps(parameters, optimizer, range(steps), spread)
    return parameters, optimizer


def take_steps(parameters, optimizer, steps, spread=lambda name, tensor: tensor):
    for step in steps:
        for i, (name, parameter) in enumerate(parameters.items()):
            gradient = gaussian(SHAPES[name], 100 * step + i + 10, parameter.dtype)
            parameter.grad = spread(name, gradient * torch.logspace(-1, 0, SHAPES[name][-1]).to(gradient))
        optimizer.step()


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def snapshot(parameters, optimizer):
    found = {name: whole(parameter) for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        found |= {f"{name}.{key}": whole(tensor) for key, tensor in optimizer.state[parameter].items()}
    return found


def different(found, expected):
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def test_with_wide_moments_it_is_torchs_adamw():
    parameters, _ = stepped(OptimizerConfig())
    theirs = {name: nn.Parameter(gaussian(shape, i)) for i, (name, shape) in enumerate(SHAPES.items())}
    take_steps(theirs, torch.optim.AdamW(theirs.values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1), range(STEPS))
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-6)


DISTANCES = {"bfloat16": 0.005, "bfloat16-stochastic": 0.01, "int8": 0.05, "int4": 0.4}


@pytest.mark.parametrize("name", DISTANCES)
def test_narrow_moments_lead_nearly_to_where_wide_ones_lead(name):
    """As parts of the way of 20 steps, with gradients whose sizes span a decade within a row."""
    exact, _ = stepped(OptimizerConfig(), steps=20)
    narrow, _ = stepped(CONFIGS[name], steps=20)
    start, _ = stepped(OptimizerConfig(), steps=0)
    for key in ("matrix", "experts"):
        away = (narrow[key] - exact[key]).norm()
        assert 0 < away < DISTANCES[name] * (exact[key] - start[key]).norm()


PLACEMENTS = {
    "fsdp-2": ((2,), {"matrix": [Shard(0)], "experts": [Shard(0)], "vector": [Shard(0)], "small": [Shard(0)]}),
    "fsdp-4": ((4,), {"matrix": [Shard(0)], "experts": [Shard(1)], "vector": [Shard(0)], "small": [Shard(0)]}),
    "tp-2": ((2,), {"matrix": [Shard(1)], "experts": [Shard(2)], "vector": [Replicate()], "small": [Shard(1)]}),
    "tp-4": ((4,), {"matrix": [Shard(1)], "experts": [Shard(2)], "vector": [Shard(0)], "small": [Shard(1)]}),
    "fsdp-2-tp-2": (
        (2, 2),
        {
            "matrix": [Shard(0), Shard(1)],
            "experts": [Shard(1), Shard(0)],
            "vector": [Shard(0), Replicate()],
            "small": [Replicate(), Shard(1)],
        },
    ),
}


def on_layout(layout):
    mesh_shape, placements = PLACEMENTS[layout]
    mesh = init_device_mesh("cpu", mesh_shape)
    return lambda name, tensor: distribute_tensor(tensor, mesh, placements[name], src_data_rank=None)


SWEPT = [pytest.param(name, marks=[pytest.mark.slow] * (name in ("fsdp-4", "tp-2", "tp-4"))) for name in PLACEMENTS]


@pytest.mark.parametrize("layout", SWEPT)
def test_parameters_and_moments_have_the_same_bits_on_every_layout(layout, monkeypatch):
    """In float32 and bfloat16, with every format, in one run of rows and in many."""
    cases = [(config, dtype) for config in CONFIGS.values() for dtype in (torch.float32, torch.bfloat16)]
    cases.append((OptimizerConfig(state_dtype="int8", parameter_rounding="stochastic"), torch.bfloat16))
    expected = [snapshot(*stepped(config, dtype=dtype)) for config, dtype in cases]
    monkeypatch.setattr("titan_core.optimizers.adamw._CPU_ELEMENTS", 2000)

    def rank():
        spread = on_layout(layout)
        return [
            different(snapshot(*stepped(config, spread, dtype=dtype)), alone)
            for (config, dtype), alone in zip(cases, expected, strict=True)
        ]

    for found in run_ranks(torch.Size(PLACEMENTS[layout][0]).numel(), rank):
        assert found == [[]] * len(cases)


@pytest.mark.parametrize(("name", "layouts"), [("int8", ("tp-4", "tp-2", "fsdp-2")), ("int4", ("fsdp-2-tp-2",))])
def test_codes_and_scales_move_unchanged_to_any_layout(name, layouts, tmp_path):
    config = CONFIGS[name]

    def tensors(parameters, optimizer):
        optimizer.create_state()
        states = {f"{n}.{key}": t for n, p in parameters.items() for key, t in optimizer.state[p].items()}
        return {n: p.detach() for n, p in parameters.items()} | states

    def save():
        dcp.save(tensors(*stepped(config, on_layout("fsdp-4"))), checkpoint_id=tmp_path / "saved")

    def load(layout):
        spread = on_layout(layout) if layout else lambda name, tensor: tensor
        parameters, optimizer = stepped(config, spread, steps=0)
        dcp.load(tensors(parameters, optimizer), checkpoint_id=tmp_path / "saved")
        loaded = snapshot(parameters, optimizer)
        take_steps(parameters, optimizer, range(STEPS, 2 * STEPS), spread)
        return loaded, snapshot(parameters, optimizer)

    run_ranks(4, save)
    saved, after = snapshot(*stepped(config)), snapshot(*stepped(config, steps=2 * STEPS))
    for layout in layouts:
        for loaded, moved in run_ranks(torch.Size(PLACEMENTS[layout][0]).numel(), load, layout):
            assert not different(loaded, saved)
            assert not different(moved, after)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_was_interrupted_goes_on_bitwise(name, dtype):
    expected = snapshot(*stepped(CONFIGS[name], dtype=dtype, steps=5))
    parameters, optimizer = stepped(CONFIGS[name], dtype=dtype, steps=2)
    model = nn.ParameterDict(parameters)
    saved = {key: tensor.clone() for key, tensor in OptimizerState(optimizer, model).state_dict().items()}

    again, fresh = stepped(CONFIGS[name], dtype=dtype, steps=0)
    state = OptimizerState(fresh, nn.ParameterDict(again))
    assert all(not tensor.any() for tensor in state.state_dict().values())
    state.load_state_dict(saved)
    with torch.no_grad():
        for key, parameter in again.items():
            parameter.copy_(parameters[key])
    take_steps(again, fresh, range(2, 5))
    assert not different(snapshot(again, fresh), expected)


def test_moments_on_the_host_give_the_same_bits():
    expected = [snapshot(*stepped(config)) for config in CONFIGS.values()]

    def rank(layout=None):
        spread = on_layout(layout) if layout else lambda name, tensor: tensor
        found = [snapshot(*stepped(config, spread, on_host=True)) for config in CONFIGS.values()]
        return [different(*both) for both in zip(found, expected, strict=True)]

    assert rank() == [[]] * len(CONFIGS)
    for found in run_ranks(4, rank, "fsdp-2-tp-2"):
        assert found == [[]] * len(CONFIGS)


def test_draws_follow_the_seed():
    config = CONFIGS["bfloat16-stochastic"]
    (first, _), (same, _) = stepped(config), stepped(config)
    other = {name: nn.Parameter(gaussian(shape, i)) for i, (name, shape) in enumerate(SHAPES.items())}
    group = {"params": list(other.items()), "lr": 1e-2, "weight_decay": 0.1}
    take_steps(other, AdamW([group], config, seed=SEED + 1), range(STEPS))
    assert torch.equal(first["matrix"], same["matrix"])
    assert not torch.equal(first["matrix"], other["matrix"])


def test_weights_in_bfloat16_keep_small_steps_when_they_are_rounded_stochastically():
    moved = {}
    for rounding in ("nearest", "stochastic"):
        weight = nn.Parameter(torch.ones(100, 100).bfloat16())
        group = {"params": [("weight", weight)], "lr": 1e-4, "weight_decay": 0.0}
        optimizer = AdamW([group], OptimizerConfig(parameter_rounding=rounding), seed=0)
        for _ in range(50):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[rounding] = 1 - weight.double().mean().item()
    assert moved["nearest"] == 0.0
    assert moved["stochastic"] == pytest.approx(50e-4, rel=0.05)


def test_a_parameter_without_a_gradient_stays_as_it_is_and_a_closure_is_called():
    parameters, optimizer = stepped(CONFIGS["int8"])
    before = snapshot(parameters, optimizer)
    parameters["matrix"].grad = None
    assert optimizer.step(lambda: 5.0) == 5.0
    after = snapshot(parameters, optimizer)
    unmoved = [name for name in before if torch.equal(before[name], after[name])]
    assert unmoved == [name for name in before if name.startswith("matrix")]


def test_what_is_no_number_is_not_hidden():
    for name, config in CONFIGS.items():
        parameters, optimizer = stepped(config)
        gradient = torch.zeros_like(parameters["matrix"])
        gradient[0, 0] = torch.nan
        parameters["matrix"].grad = gradient
        optimizer.step()
        take_steps(parameters, optimizer, range(2))
        assert parameters["matrix"][0, 0].isnan(), name


def test_nothing_as_large_as_a_parameter_is_made_in_a_step():
    weight = nn.Parameter(torch.ones(512, 4096))
    optimizer = AdamW([{"params": [("w", weight)], "lr": 1e-2, "weight_decay": 0.1}], CONFIGS["int8"], seed=0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
                sizes.append(result.nbytes)
            return result

    with Watch():
        optimizer.step()
    assert max(sizes) == 4 * 2**18
    assert weight.nbytes == 8 * max(sizes)


def test_torchs_own_way_to_load_a_state_is_refused():
    _, optimizer = stepped(CONFIGS["int8"])
    with pytest.raises(RuntimeError, match="OptimizerState"):
        optimizer.load_state_dict(optimizer.state_dict())


LAYOUTS = {
    "fsdp-2": (2, ParallelConfig()),
    "hsdp-2x2": (4, ParallelConfig(dp_replicate=2)),
    "tp-2": (2, ParallelConfig(tp=2)),
    "fsdp-2-tp-2": (4, ParallelConfig(tp=2)),
    "pp-2": (2, ParallelConfig(pp=2)),
}


def chain(generator):
    """Tokens [8, 9], most of which follow from the one before."""
    noise = torch.randint(0, 32, (8, 9), generator=generator)
    surprising = torch.rand(8, 9, generator=generator) < 0.2
    tokens = noise.clone()
    for i in range(1, 9):
        tokens[:, i] = torch.where(surprising[:, i], noise[:, i], (5 * tokens[:, i - 1] + 3) % 32)
    return tokens


@pytest.fixture
def losses(toy, toy_roles, toy_rules, monkeypatch):
    """Losses of the toy in float64, all of whose matrices are quantized, on its rows of fixed global batches."""
    monkeypatch.setattr(moments, "_LEAST_QUANTIZED", 1)

    def run(config, world_size=1, parallel=None, *, steps=6, dtype=torch.float64, lr=1e-2, micro=1):
        parallel = parallel or ParallelConfig()
        meshes = build_meshes(resolve_degrees(parallel, world_size), "cpu") if world_size > 1 else None
        model = toy(dtype)
        roles = resolve_roles(model, toy_roles)
        layout = parallelize(
            model, roles, meshes, parallel, micro_batch_size=micro, param_dtype=dtype, reduce_dtype=dtype
        )
        materialize(layout.model, torch.device("cpu"))
        init_parameters(layout.model, toy_rules, 7)
        optimizer = build_optimizer(layout.model, roles, OptimizerConfig(lr=lr, **config), seed=1)
        OptimizerState(optimizer, layout.model).state_dict()
        rank, dp = (0, 1) if meshes is None else (data_rank(meshes.data), meshes.degrees.dp)
        generator = torch.Generator().manual_seed(0)
        history = []
        for _ in range(steps):
            tokens = chain(generator)[rank::dp]
            loss = layout.accumulate({"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}, divisor=64)
            optimizer.step()
            optimizer.zero_grad()
            if meshes is not None:
                sum_over(loss, meshes.data)
            history.append(loss.item())
        return history

    return run


TRAINED = [("int8", "fsdp-2-tp-2"), ("int4", "pp-2")]
OTHERS = [(d, layout) for d in ("int8", "int4") for layout in LAYOUTS if (d, layout) not in TRAINED]


@pytest.mark.parametrize(
    ("state_dtype", "layout"), [*TRAINED, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)]
)
def test_training_does_not_depend_on_the_layout(losses, state_dtype, layout):
    world_size, parallel = LAYOUTS[layout]
    expected = losses({"state_dtype": state_dtype})
    assert expected != pytest.approx(losses({}), rel=1e-7)
    for history in run_ranks(world_size, losses, {"state_dtype": state_dtype}, world_size, parallel):
        assert history == pytest.approx(expected, rel=1e-9)


def test_200_steps_end_within_a_hundredth_of_the_loss_of_float32(losses):
    def curve(**config):
        history = losses(config, steps=200, dtype=torch.float32, micro=8)
        return sum(history[:20]) / 20, sum(history[-20:]) / 20

    start, exact = curve()
    assert exact < start / 2
    for config in (
        {"state_dtype": "bfloat16"},
        {"state_dtype": "bfloat16", "state_rounding": "stochastic"},
        {"state_dtype": "int8"},
    ):
        _, found = curve(**config)
        assert found != exact
        assert found == pytest.approx(exact, rel=0.01), config
