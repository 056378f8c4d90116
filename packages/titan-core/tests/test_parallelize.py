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
from titan_core.mesh import build_mesh, data_rank, sum_over
from titan_core.optim import build_adamw
from titan_core.parallelize import parallelize
from titan_core.roles import resolve_roles

BATCH, STEPS = 12, 4
LAYOUTS = {
    "fsdp-2": (2, ParallelConfig()),
    "fsdp-4": (4, ParallelConfig()),
    "fsdp-3-uneven": (3, ParallelConfig()),
    "fsdp-2-keep": (2, ParallelConfig(reshard_after_forward=False)),
    "fsdp-2-last": (2, ParallelConfig(grad_sync="last")),
    "ddp-2": (2, ParallelConfig(dp_replicate=2)),
    "ddp-2-every": (2, ParallelConfig(dp_replicate=2, grad_sync="every")),
    "hsdp-2x2": (4, ParallelConfig(dp_replicate=2)),
    "hsdp-2x2-every": (4, ParallelConfig(dp_replicate=2, grad_sync="every")),
    "hsdp-2x2-last": (4, ParallelConfig(dp_replicate=2, grad_sync="last")),
}


@pytest.fixture
def train(toy, toy_roles, toy_rules):
    """Trains the toy for a few steps on its rows of fixed global batches; returns losses and gradient norms."""

    def run(config=None, world_size=1, *, master, param=None, reduce=None, tied=False, micro=1, device="cpu"):
        mesh, rank, dp = None, 0, 1
        if world_size > 1:
            degrees = resolve_degrees(config, world_size)
            mesh = build_mesh(degrees, "cpu")
            rank, dp = data_rank(mesh), degrees.dp
        model = toy(master, tied=tied)
        roles = resolve_roles(model, toy_roles)
        layout = parallelize(
            model, roles, mesh, config or ParallelConfig(), param_dtype=param or master, reduce_dtype=reduce or master
        )
        materialize(model, torch.device(device))
        init_parameters(model, toy_rules, 7)
        optimizer = build_adamw(model, roles, OptimizerConfig(lr=1e-2))
        generator = torch.Generator().manual_seed(0)
        history = []
        for _ in range(STEPS):
            tokens = torch.randint(0, 32, (BATCH, 11), generator=generator)
            rows = [range(r, BATCH, dp) for r in range(dp)][rank]
            pieces = tokens[list(rows)].to(device).split(micro)
            total = torch.zeros((), dtype=torch.float64, device=device)
            layout.begin_step()
            for i, piece in enumerate(pieces):
                with layout.micro_batch(last=i == len(pieces) - 1):
                    logits = model(piece[:, :-1]).to(torch.promote_types(param or master, torch.float32))
                    loss = torch.nn.functional.cross_entropy(
                        logits.flatten(0, 1), piece[:, 1:].flatten(), reduction="sum"
                    ) / (BATCH * 10)
                    loss.backward()
                total += loss.detach()
            norm = clip_gradients(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if mesh is not None:
                sum_over(total, mesh)
            history += [total.item(), norm.item()]
        return history

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_curves_agree_to_rounding(train, layout):
    world_size, config = LAYOUTS[layout]
    expected = train(master=torch.float64)
    for history in run_ranks(world_size, train, config, world_size, master=torch.float64):
        assert history == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixed_precision_means_the_same_everywhere(train, layout):
    world_size, config = LAYOUTS[layout]
    dtypes = {"master": torch.float32, "param": torch.bfloat16, "reduce": torch.float32}
    expected = train(**dtypes)
    assert expected != pytest.approx(train(master=torch.float32), rel=1e-5)  # it is mixed at all
    for history in run_ranks(world_size, train, config, world_size, **dtypes):
        # bfloat16 rounds to 4e-3; these differ only by the order of float32 sums.
        assert history == pytest.approx(expected, rel=1e-5)


def test_tied_parameters_stay_tied(train):
    expected = train(master=torch.float64, tied=True)
    for world_size, config in ((2, ParallelConfig()), (4, ParallelConfig(dp_replicate=2))):
        for history in run_ranks(world_size, train, config, world_size, master=torch.float64, tied=True):
            assert history == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("micro", [4, 12])
def test_accumulation_changes_nothing(train, micro):
    assert train(master=torch.float64, micro=micro) == pytest.approx(train(master=torch.float64), rel=1e-12)


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
        mesh = build_mesh(resolve_degrees(ParallelConfig(), world_size), "cpu") if world_size > 1 else None
        model = toy()
        layout = parallelize(
            model,
            resolve_roles(model, toy_roles),
            mesh,
            ParallelConfig(),
            param_dtype=torch.bfloat16,
            reduce_dtype=torch.float32,
        )
        materialize(model, torch.device("cpu"))
        init_parameters(model, toy_rules, 7)
        layout.begin_step()
        with OpDtypes() as ops, layout.micro_batch(last=True):
            model(torch.zeros(2, 5, dtype=torch.int64)).float().sum().backward()
        return ops.seen, {str(p.grad.dtype) for p in model.parameters()}

    alone = observe(1)
    assert any("bfloat16" in entry for _, *dtypes in alone[0] for entry in dtypes)
    assert alone[1] == {"torch.float32"}
    for sharded in run_ranks(2, observe, 2):
        assert sharded == alone


def test_whole_gradients_are_counted_where_they_are_kept(toy, toy_roles):
    def kept(config, world_size):
        model = toy()
        mesh = build_mesh(resolve_degrees(config, world_size), "cpu")
        layout = parallelize(
            model,
            resolve_roles(model, toy_roles),
            mesh,
            config,
            param_dtype=torch.bfloat16,
            reduce_dtype=torch.float32,
        )
        return layout.gradient_bytes()

    whole = 4 * sum(p.numel() for p in toy().parameters())
    assert run_ranks(2, kept, ParallelConfig(), 2) == [0, 0]
    assert run_ranks(2, kept, ParallelConfig(grad_sync="last"), 2) == [whole, whole]
    assert run_ranks(2, kept, ParallelConfig(dp_replicate=2), 2) == [whole, whole]


def test_parameters_are_their_own_outside_of_a_micro_batch(toy, toy_roles, toy_rules):
    model = toy()
    layout = parallelize(
        model,
        resolve_roles(model, toy_roles),
        None,
        ParallelConfig(),
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
    )
    materialize(model, torch.device("cpu"))
    init_parameters(model, toy_rules, 7)
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
    assert train(master=torch.float64, device="cuda") == pytest.approx(train(master=torch.float64), rel=1e-9)


@pytest.mark.gpu
def test_mixed_precision_on_a_gpu_agrees_with_the_cpu(train):
    dtypes = {"master": torch.float32, "param": torch.bfloat16, "reduce": torch.float32}
    # Both round to bfloat16, eight bits of mantissa, after sums in different orders.
    assert train(**dtypes, device="cuda") == pytest.approx(train(**dtypes), rel=2**-6)
