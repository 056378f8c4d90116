"""One experiment on every data-parallel layout: same losses, gradients norms and dtypes as on one device."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ranks import run_ranks
from titan_core.clip import clip_gradients
from titan_core.config import OptimizerConfig, ParallelConfig
from titan_core.degrees import resolve_degrees
from titan_core.init import init_parameters, materialize
from titan_core.mesh import build_meshes, data_rank, sum_over
from titan_core.optim import build_optimizer
from titan_core.parallelize import parallelize
from titan_core.roles import resolve_roles

BATCH, STEPS, LENGTH = 12, 4, 8
LAYOUTS = {
    "fsdp-2": (2, ParallelConfig()),
    "fsdp-4": (4, ParallelConfig()),
    "fsdp-3-uneven": (3, ParallelConfig()),
    "fsdp-2-keep": (2, ParallelConfig(reshard_after_forward="never")),
    "fsdp-2-last": (2, ParallelConfig(grad_sync="last")),
    "ddp-2": (2, ParallelConfig(dp_replicate=2)),
    "ddp-2-every": (2, ParallelConfig(dp_replicate=2, grad_sync="every")),
    "hsdp-2x2": (4, ParallelConfig(dp_replicate=2)),
    "hsdp-2x2-every": (4, ParallelConfig(dp_replicate=2, grad_sync="every")),
    "hsdp-2x2-last": (4, ParallelConfig(dp_replicate=2, grad_sync="last")),
    "fsdp-2-offloaded": (2, ParallelConfig(cpu_offload=True)),
    "fsdp-4-partly": (4, ParallelConfig(reshard_after_forward=2)),
    "tp-2": (2, ParallelConfig(tp=2)),
    "tp-2-whole-sequences": (2, ParallelConfig(tp=2, sequence_parallel=False)),
    "fsdp-2-tp-2": (4, ParallelConfig(tp=2)),
    "pp-2": (2, ParallelConfig(pp=2)),
    "pp-2-tp-2": (4, ParallelConfig(pp=2, tp=2, pp_schedule="Interleaved1F1B")),
}


def lay_out(toy, toy_roles, toy_rules, config, world_size, *, param, tied=False, micro=1, reduce=None, device="cpu"):
    """The toy in float32 or float64, laid out and initialised, with its meshes."""
    master = torch.float64 if param == torch.float64 else torch.float32
    meshes = build_meshes(resolve_degrees(config, world_size), "cpu") if world_size > 1 else None
    model = toy(master, tied=tied)
    roles = resolve_roles(model, toy_roles)
    layout = parallelize(
        model, roles, meshes, config, micro_batch_size=micro, param_dtype=param, reduce_dtype=reduce or master
    )
    materialize(layout.model, torch.device(device))
    init_parameters(layout.model, toy_rules, 7)
    return layout, roles, meshes


@pytest.fixture
def train(toy, toy_roles, toy_rules):
    """Trains the toy for a few steps on its rows of fixed global batches; returns losses and gradient norms."""

    def run(config=None, world_size=1, *, param=torch.float64, device="cpu", **options):
        config = config or ParallelConfig()
        layout, roles, meshes = lay_out(
            toy, toy_roles, toy_rules, config, world_size, param=param, device=device, **options
        )
        rank, dp = (0, 1) if meshes is None else (data_rank(meshes.data), meshes.degrees.dp)
        stages = meshes.group("pp") if meshes is not None and config.pp > 1 else None
        optimizer = build_optimizer(layout.model, roles, OptimizerConfig(lr=1e-2))
        generator = torch.Generator().manual_seed(0)
        history = []
        for _ in range(STEPS):
            tokens = torch.randint(0, 32, (BATCH, LENGTH + 1), generator=generator)[rank::dp].to(device)
            batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
            loss = layout.accumulate(batch, divisor=BATCH * LENGTH)
            norm = clip_gradients(layout.model.parameters(), 1.0, stages)
            optimizer.step()
            optimizer.zero_grad()
            if meshes is not None:
                sum_over(loss, meshes.data)
            history += [loss.item(), norm.item()]
        return history

    return run


# What differs from the others by one more rank or one more axis.
LONG = ("fsdp-4", "ddp-2-every", "hsdp-2x2-every", "tp-2-whole-sequences", "fsdp-2-keep", "pp-2-tp-2")
EACH = [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in LAYOUTS]


@pytest.mark.parametrize("layout", EACH)
def test_float64_curves_agree_to_rounding(train, layout):
    world_size, config = LAYOUTS[layout]
    expected = train()
    for history in run_ranks(world_size, train, config, world_size, micro=2):
        assert history == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("layout", EACH)
def test_mixed_precision_means_the_same_everywhere(train, layout):
    world_size, config = LAYOUTS[layout]
    expected = train(param=torch.bfloat16)
    assert expected != pytest.approx(train(param=torch.float32), rel=1e-5)  # it is mixed at all
    for history in run_ranks(world_size, train, config, world_size, param=torch.bfloat16):
        if config.tp == 1:  # these differ only by the order of float32 sums
            assert history == pytest.approx(expected, rel=1e-5)
        else:  # each rank's share of a sum is rounded to bfloat16, by up to 4e-3; here only losses
            assert history[::2] == pytest.approx(expected[::2], rel=1e-2)


def test_tied_parameters_stay_tied(train):
    expected = train(tied=True)
    for world_size, config in ((2, ParallelConfig()), (2, ParallelConfig(dp_replicate=2)), (2, ParallelConfig(tp=2))):
        for history in run_ranks(world_size, train, config, world_size, tied=True, micro=3):
            assert history == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("micro", [4, 12])
def test_accumulation_changes_nothing(train, micro):
    assert train(micro=micro) == pytest.approx(train(), rel=1e-12)


class OpDtypes(TorchDispatchMode):
    """The dtypes of floating-point inputs and outputs of each matrix product and norm, in order."""

    WATCHED = ("aten.mm", "aten.addmm", "aten.bmm", "aten.native_layer_norm", "aten.embedding", "aten.relu")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket)
        if name.startswith(self.WATCHED):
            tensors = itertools.chain(args, out if isinstance(out, tuple) else (out,))
            self.seen.append((name, *(str(t.dtype) for t in tensors if isinstance(t, torch.Tensor))))
        return out


def test_ops_run_in_the_same_dtypes_with_and_without_shards(toy, toy_roles, toy_rules):
    def observe(world_size):
        config = ParallelConfig()
        layout, _, _ = lay_out(toy, toy_roles, toy_rules, config, world_size, param=torch.bfloat16, micro=2)
        tokens = torch.zeros(2, 5, dtype=torch.int64)
        with OpDtypes() as ops:
            layout.accumulate({"tokens": tokens, "labels": tokens}, divisor=10)
        return ops.seen, {str(p.grad.dtype) for p in layout.model.parameters()}

    alone = observe(1)
    assert any("bfloat16" in entry for _, *dtypes in alone[0] for entry in dtypes)
    assert alone[1] == {"torch.float32"}
    for sharded in run_ranks(2, observe, 2):
        assert sharded == alone


def test_a_pipeline_takes_whole_micro_batches_only(toy, toy_roles, toy_rules):
    def run():
        config = ParallelConfig(pp=2)
        layout, _, _ = lay_out(toy, toy_roles, toy_rules, config, 2, param=torch.float64, micro=3)
        tokens = torch.zeros(8, 5, dtype=torch.int64)
        with pytest.raises(ValueError, match="got 8 rows, which do not fill micro-batches of 3"):
            layout.accumulate({"tokens": tokens, "labels": tokens}, divisor=1)
        return True

    assert run_ranks(2, run) == [True, True]


def test_whole_gradients_are_counted_where_they_are_kept(toy, toy_roles, toy_rules):
    def kept(config, world_size):
        layout, _, _ = lay_out(toy, toy_roles, toy_rules, config, world_size, param=torch.bfloat16)
        return layout.gradient_bytes()

    whole = 4 * sum(p.numel() for p in toy().parameters())
    assert run_ranks(2, kept, ParallelConfig(), 2) == [0, 0]
    assert run_ranks(2, kept, ParallelConfig(grad_sync="last"), 2) == [whole, whole]
    assert run_ranks(2, kept, ParallelConfig(dp_replicate=2), 2) == [whole, whole]
    assert sum(run_ranks(2, kept, ParallelConfig(pp=2), 2)) == whole
    linear = 4 * 4 * (2 * 12 * 36)
    halves = run_ranks(4, kept, ParallelConfig(tp=2, grad_sync="last"), 4)
    assert all(whole / 2 < half < whole - linear / 2 + 1 for half in halves)


def test_parameters_are_their_own_outside_of_a_micro_batch(toy, toy_roles, toy_rules):
    layout, _, _ = lay_out(toy, toy_roles, toy_rules, ParallelConfig(), 1, param=torch.bfloat16)
    model = layout.model
    before = list(model.parameters())
    layout.begin_step()
    within = []

    def fail():
        with layout.micro_batch(last=True):
            within.append(model.head.weight.dtype)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert within == [torch.bfloat16]
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert model.head.weight.dtype == torch.float32


@pytest.mark.gpu
def test_one_gpu_agrees_with_the_cpu(train):
    assert train(device="cuda") == pytest.approx(train(), rel=1e-9)


@pytest.mark.gpu
def test_mixed_precision_on_a_gpu_agrees_with_the_cpu(train):
    # Both round to bfloat16, eight bits of mantissa, after sums in different orders.
    assert train(param=torch.bfloat16, device="cuda") == pytest.approx(train(param=torch.bfloat16), rel=2**-6)
