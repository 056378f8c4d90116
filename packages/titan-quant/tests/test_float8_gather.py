import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ranks import run_ranks
from titan_quant.config import QuantConfig
from titan_quant.convert import quantize
from titan_quant.float8_gather import Float8Gather, GatherError

TENSORWISE = QuantConfig(recipe="float8_tensorwise", emulate=True, skip_small=False)


def sharded(dtype=None, *, config=TENSORWISE, mesh=None, meta=False, **options):
    """Two layers and a norm, each sharded; 48 rows and 112 do not fall evenly on 3 or 5 ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.LayerNorm(48), nn.SiLU(), nn.Linear(48, 112))
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if meta:
        model = model.to("meta")
    quantize(model, config)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (model[0], model[3], model):
        fully_shard(module, mesh=mesh, mp_policy=policy, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gloo neither averages nor scales
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    if meta:
        model.to_empty(device="cpu")
        for name, parameter in model.named_parameters():
            parameter.detach().to_local().copy_(whole[name].chunk(dist.get_world_size())[dist.get_rank()])
    return model


def trained(model, gather, *, precompute=True, dtype=None, steps=2):
    """Outputs of every micro-batch, and the state at the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(dist.get_rank())
    outputs = []
    for _ in range(steps):
        for _ in range(2):
            out = model(torch.randn(4, 64, dtype=dtype))
            out.float().square().mean().backward()
            outputs.append(out.detach().clone())
        optimizer.step()
        optimizer.zero_grad()
        if gather is not None and precompute:
            gather.precompute_scales()
    return outputs, {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True)) and all(
        torch.equal(a[1][name], b[1][name]) for name in b[1]
    )


@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.bfloat16), (3, None)])
def test_training_is_the_same_bits_with_and_without(ranks, dtype):
    def rank():
        plain = trained(sharded(dtype), None, dtype=dtype)
        results = []
        for precompute in (True, False):
            model = sharded(dtype)
            results.append(same(trained(model, Float8Gather(model), precompute=precompute, dtype=dtype), plain))
        return results

    assert run_ranks(ranks, rank) == [[True, True]] * ranks


def test_a_model_that_gets_its_memory_after_sharding_and_replicas_of_shards_are_the_same_too():
    def rank():
        results = []
        for shape in ((2, 2), (4, 1)):
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
            plain = trained(sharded(mesh=mesh), None)
            model = sharded(mesh=mesh)
            results.append(same(trained(model, Float8Gather(model)), plain))
        plain = trained(sharded(), None)
        model = sharded(meta=True)
        return [*results, same(trained(model, Float8Gather(model)), plain)]

    assert run_ranks(4, rank) == [[True, True, True]] * 4


def test_weights_travel_as_bytes_and_scales_in_one_collective(monkeypatch):
    def rank():
        gathered, reduced = [], []
        gather, reduce = dist.all_gather_single, torch.ops._c10d_functional.all_reduce
        monkeypatch.setattr(
            dist, "all_gather_single", lambda out, x, **k: gathered.append(x.nbytes) or gather(out, x, **k)
        )
        monkeypatch.setattr(
            torch.ops._c10d_functional, "all_reduce", lambda x, *a: reduced.append(x.numel()) or reduce(x, *a)
        )
        bits = []
        for use in (False, True):
            model = sharded(torch.bfloat16)
            taken = Float8Gather(model) if use else None
            if taken:
                taken.precompute_scales()
            gathered.clear()
            with torch.no_grad():
                model(torch.randn(1, 64, dtype=torch.bfloat16))
            bits.append(sum(gathered))
        return bits, reduced

    weights, others = 64 * 48 + 48 * 112, 48 + 48 + 48 + 112
    for bits, reduced in run_ranks(2, rank):
        assert bits == [2 * (weights + others) // 2, (weights + 2 * others) // 2]
        assert reduced == [2]


def test_what_others_see_of_a_weight_is_as_it_was():
    def rank():
        model = sharded(torch.bfloat16)
        before = {name: (type(t), t.placements, t.dtype, type(t.to_local())) for name, t in model.state_dict().items()}
        trained(model, Float8Gather(model), dtype=torch.bfloat16, steps=1)
        after = {name: (type(t), t.placements, t.dtype, type(t.to_local())) for name, t in model.state_dict().items()}
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(1, 64, dtype=torch.bfloat16)).float().sum().backward()
        optimizer.step()
        state = optimizer.state[model[0].weight]["exp_avg"]
        return before == after, after["0.weight"][0] is DTensor, type(state.to_local()) is torch.Tensor

    assert run_ranks(2, rank) == [(True, True, True)] * 2


def test_what_cannot_be_gathered_so_is_refused():
    def refusal(**options):
        model = sharded(**options)
        try:
            Float8Gather(model)
        except GatherError as error:
            return str(error)

    def rank():
        rowwise = QuantConfig(recipe="float8_rowwise", emulate=True, skip_small=False)
        cut = refusal(shard_placement_fn=lambda p: Shard(p.ndim - 1))
        return refusal(config=rowwise), cut, refusal(reshard_after_forward=2)

    for none, columns, partly in run_ranks(4, rank):
        assert "nothing to gather in float8" in none
        assert "cuts them along another dimension" in columns
        assert "partly gathered" in partly
