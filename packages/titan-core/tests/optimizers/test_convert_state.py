import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ranks import run_ranks
from titan_core.config import OptimizerConfig
from titan_core.optim import OptimizerState, build_optimizer
from titan_core.optimizers.convert_state import ConvertedState

ROWS, COLUMNS = 40, 300
# Of the largest number in a block of 150 or 100, or of each number.
BOUNDS = {"float32": 0.0, "bfloat16": 2**-8, "int8": 0.45 / 64 + 2**-12, "int4": 0.45 / 4 + 2**-12}


def gaussian(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Model(nn.Module):
    def __init__(self, placement=None):
        super().__init__()
        weight = gaussian(0, ROWS, COLUMNS)
        if placement is not None:
            weight = distribute_tensor(weight, init_device_mesh("cpu", (2,)), [placement], src_data_rank=None)
        self.up = nn.Linear(COLUMNS, ROWS, bias=False, device="meta")
        self.up.weight = nn.Parameter(weight)
        self.norm = nn.LayerNorm(COLUMNS, bias=False)


ROLES = {"up": "colwise", "norm": "norm"}


def trained(state_dtype, placement=None, *, name="adamw", steps=3):
    model = Model(placement)
    optimizer = build_optimizer(model, ROLES, OptimizerConfig(state_dtype=state_dtype, name=name))
    for step in range(steps):
        for i, parameter in enumerate(model.parameters()):
            gradient = gaussian(10 * step + i, *parameter.shape)
            if placement is not None and i == 0:
                gradient = distribute_tensor(gradient, parameter.device_mesh, [placement], src_data_rank=None)
            parameter.grad = gradient
        optimizer.step()
    return model, optimizer


def copied(state):
    return {key: tensor.clone() for key, tensor in state.items()}


@pytest.mark.parametrize("now", BOUNDS)
@pytest.mark.parametrize("saved", BOUNDS)
def test_moments_change_by_no_more_than_the_new_format_rounds(saved, now):
    model, optimizer = trained(saved)
    checkpoint = copied(OptimizerState(optimizer, model).state_dict())
    wide_model, wide = trained("float32", steps=0)
    converted = ConvertedState(wide, wide_model, saved=saved, now="float32")
    assert {key: tensor.dtype for key, tensor in converted.state_dict().items()} == {
        key: tensor.dtype for key, tensor in checkpoint.items()
    }
    converted.load_state_dict(checkpoint)

    other_model, other = trained(now, steps=1)  # whatever it held is replaced
    ConvertedState(other, other_model, saved=saved, now=now).load_state_dict(checkpoint)
    back_model, back = trained("float32", steps=0)
    ConvertedState(back, back_model, saved=now, now="float32").load_state_dict(
        copied(OptimizerState(other, other_model).state_dict())
    )
    size = {"int8": 150, "int4": 100}.get(now, 1)
    for moment in ("exp_avg", "exp_avg_sq"):
        before, after = (o.state[m.up.weight][moment] for m, o in ((wide_model, wide), (back_model, back)))
        errors, largest = (x.view(ROWS, -1, size).abs().amax(-1) for x in (after - before, before))
        assert (errors <= BOUNDS[now] * largest * (1 + 1e-6)).all()
        assert before.any()
    assert back.state[back_model.up.weight]["step"] == 3
    if now != "bfloat16":
        vectors = [o.state[m.norm.weight]["exp_avg"] for m, o in ((wide_model, wide), (back_model, back))]
        assert torch.equal(*vectors)


def test_momentum_of_muon_is_converted():
    model, optimizer = trained("float32", name="muon")
    checkpoint = copied(OptimizerState(optimizer, model).state_dict())
    other_model, other = trained("bfloat16", name="muon", steps=0)
    ConvertedState(other, other_model, saved="float32", now="bfloat16").load_state_dict(checkpoint)
    found = other.state[other_model.up.weight]["momentum"]
    assert torch.equal(found, checkpoint["up.weight.momentum"].bfloat16())


@pytest.mark.parametrize("placement", [Shard(0), Shard(1)])
def test_ranks_convert_as_one_process_does(placement):
    def convert(placement=None):
        model, optimizer = trained("float32", placement)
        checkpoint = OptimizerState(optimizer, model).state_dict()
        other_model, other = trained("int4", placement, steps=0)
        ConvertedState(other, other_model, saved="float32", now="int4").load_state_dict(checkpoint)
        state = OptimizerState(other, other_model).state_dict()
        return {key: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for key, t in state.items()}

    expected = convert()
    for found in run_ranks(2, convert, placement):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
