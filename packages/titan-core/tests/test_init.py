import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor, empty

from ranks import run_ranks
from titan_core.init import InitError, draw_normal, init_parameters, materialize


def whole(shape, std=0.02, seed=1, name="w"):
    return draw_normal(shape, tuple(slice(0, n) for n in shape), std, seed, name)


def test_draws_are_normal_cut_at_three_deviations():
    x = whole((300, 1000))
    assert abs(x.mean()) < 2e-4
    assert x.std() == pytest.approx(0.02, rel=0.01)
    assert np.abs(x).max() == pytest.approx(0.06)
    assert 0.001 < (np.abs(x) > 0.0599).mean() < 0.005  # 0.27% of a normal lie beyond three deviations


def test_seed_and_name_decide_the_numbers():
    x = whole((4, 70_000))
    assert np.array_equal(x, whole((4, 70_000)))
    assert not np.array_equal(x, whole((4, 70_000), seed=2))
    assert not np.array_equal(x, whole((4, 70_000), name="v"))
    assert len({row.tobytes() for row in whole((5000, 3))}) == 5000
    assert len({row.tobytes() for row in x}) == 4  # one panel a row: panels differ


@pytest.mark.parametrize("shape", [(7,), (13, 5), (40, 4000), (3, 50, 900)])
def test_any_part_equals_the_same_part_of_the_whole(shape):
    reference = whole(shape)
    generator = np.random.default_rng(0)
    for _ in range(20):
        ends = [sorted(generator.integers(0, n + 1, 2)) for n in shape]
        part = tuple(slice(int(a), int(b)) for a, b in ends)
        assert np.array_equal(draw_normal(shape, part, 0.02, 1, "w"), reference[part])


def test_a_rank_draws_only_about_what_it_owns(monkeypatch):
    drawn = 0
    original = np.random.Generator

    class Counting:
        def __init__(self, bits):
            self.generator = original(bits)

        def standard_normal(self, shape, dtype):
            nonlocal drawn
            drawn += int(np.prod(shape))
            return self.generator.standard_normal(shape, dtype=dtype)

    monkeypatch.setattr(np.random, "Generator", Counting)
    draw_normal((4096, 4096), (slice(1024, 1536), slice(0, 4096)), 0.02, 1, "w")
    assert drawn <= 1.1 * 512 * 4096


def test_sharded_parameters_get_their_part_of_the_whole():
    reference = whole((24, 10))

    def run():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        model = torch.nn.Module()
        for name, placements in {"rows": (Shard(0), Shard(0)), "both": (Shard(0), Shard(1))}.items():
            parameter = torch.nn.Parameter(empty(24, 10, device_mesh=mesh, placements=placements))
            model.register_parameter(name, parameter)
        out = {}
        for name, parameter in list(model.named_parameters()):
            inner = torch.nn.Module()
            inner.w = parameter
            init_parameters(inner, {"w": ("normal", 0.02)}, 1)
            out[name] = parameter.full_tensor().detach().numpy()
        return out

    for result in run_ranks(4, run):
        assert np.array_equal(result["rows"], reference)
        assert np.array_equal(result["both"], reference)


def test_every_dtype_starts_from_the_same_draw(toy, toy_rules):
    models = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = toy(dtype)
        materialize(model, torch.device("cpu"))
        init_parameters(model, toy_rules, 3)
        models.append(dict(model.named_parameters()))
    single, double, half = models
    for name, parameter in single.items():
        assert torch.equal(double[name], parameter.double())
        assert torch.equal(half[name], parameter.bfloat16())


def test_materialize_keeps_shared_parameters_shared(toy, toy_rules):
    model = toy(tied=True)
    materialize(model, torch.device("cpu"))
    assert model.head.weight is model.embed.weight
    assert not any(p.is_meta for p in model.parameters())
    init_parameters(model, toy_rules, 0)
    assert model.norm.weight.min() == model.norm.weight.max() == 1


def test_parameters_and_buffers_may_lie_apart_and_both_have_rules(toy):
    model = toy()
    model.register_buffer("count", torch.empty(3, device="meta"))
    materialize(model, torch.device("cpu"), parameters=torch.device("meta"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not model.count.is_meta
    holder = torch.nn.Module()
    holder.register_buffer("count", torch.full((3,), 7.0))
    init_parameters(holder, {"count": ("constant", 0.0)}, 0)
    assert not holder.count.any()
    with pytest.raises(InitError, match="'count' has no initialisation rule"):
        init_parameters(holder, {"other": ("constant", 0.0)}, 0)


def test_a_parameter_without_a_rule_is_named_before_anything_changes(toy, toy_rules):
    model = toy()
    materialize(model, torch.device("cpu"))
    for parameter in model.parameters():
        parameter.data.fill_(7)
    rules = {pattern: rule for pattern, rule in toy_rules.items() if "bias" not in pattern}
    with pytest.raises(InitError, match=r"'layers\.0\.mix\.up\.bias' has no initialisation rule"):
        init_parameters(model, rules, 0)
    with pytest.raises(InitError, match="unknown kind 'uniform'"):
        init_parameters(model, {"*.*": ("uniform", 1.0), "*.*.*.*": ("uniform", 1.0), "*.*.*.*.*": ("uniform", 1.0)}, 0)
    assert all((p == 7).all() for p in model.parameters())


def test_distribute_tensor_would_agree():
    """The offsets that a shard's draw uses are those by which torch itself cuts a tensor."""
    reference = torch.from_numpy(whole((7, 4)))

    def run():
        mesh = init_device_mesh("cpu", (3,))
        cut = distribute_tensor(reference, mesh, [Shard(0)])
        module = torch.nn.Module()
        module.w = torch.nn.Parameter(empty(7, 4, device_mesh=mesh, placements=[Shard(0)]))
        init_parameters(module, {"w": ("normal", 0.02)}, 1)
        return torch.equal(module.w.to_local(), cut.to_local())

    assert run_ranks(3, run) == [True] * 3
