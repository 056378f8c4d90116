import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from ranks import run_ranks
from titan_quant.config import MixedPrecision
from titan_quant.policy import Dtypes, autocast, fsdp_policy, resolve_dtypes, torch_dtype

BF16 = MixedPrecision(param_dtype="bfloat16")


def test_names_are_torchs_own():
    assert torch_dtype("bfloat16") is torch.bfloat16
    assert torch_dtype("float8_e4m3fn") is torch.float8_e4m3fn


@pytest.mark.parametrize("name", ["bf16", "nn", "Tensor", ""])
def test_what_is_no_dtype_is_refused(name):
    with pytest.raises(ValueError, match="torch has no dtype"):
        torch_dtype(name)


def test_a_policy_resolves_to_dtypes():
    assert resolve_dtypes(BF16) == Dtypes(master=torch.float32, param=torch.bfloat16, reduce=torch.float32)
    with pytest.raises(ValueError, match="wider than master_dtype"):
        resolve_dtypes(MixedPrecision(param_dtype="float64"))


def test_autocast_computes_in_param_and_keeps_master():
    layer = nn.Linear(4, 3).to(resolve_dtypes(BF16).master)
    with autocast(BF16, "cpu"):
        out = layer(torch.ones(2, 4))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("master", ["float32", "float64", "bfloat16"])
def test_autocast_does_nothing_where_nothing_is_mixed(master):
    policy = MixedPrecision(master_dtype=master)
    layer = nn.Linear(4, 3).to(resolve_dtypes(policy).master)
    with autocast(policy, "cpu"):
        assert layer(torch.ones(2, 4, dtype=layer.weight.dtype)).dtype == torch_dtype(master)


@pytest.mark.parametrize("param", ["bfloat16", "float32"])
def test_autocast_refuses_what_it_would_ignore(param):
    with pytest.raises(ValueError, match=r"with weights in torch\.float64"):
        autocast(MixedPrecision(master_dtype="float64", param_dtype=param), "cpu")


@pytest.mark.parametrize(("reduce", "mean"), [("float32", (1 + 2**-10) / 2), ("bfloat16", 0.5)])
def test_fsdp_computes_in_param_and_reduces_in_reduce(reduce, mean):
    """bfloat16 has 8 bits: each rank's gradient fits, their sum does not."""
    policy = MixedPrecision(param_dtype="bfloat16", reduce_dtype=reduce)

    def rank():
        layer = nn.Linear(1, 2, bias=False).to(resolve_dtypes(policy).master)
        fully_shard(layer, mp_policy=fsdp_policy(policy))
        out = layer(torch.tensor([[1.0 if torch.distributed.get_rank() == 0 else 2**-10]]))
        out.sum().backward()
        return out.dtype, layer.weight.dtype, layer.weight.grad.full_tensor()

    for computed, kept, gradient in run_ranks(2, rank):
        assert (computed, kept, gradient.dtype) == (torch.bfloat16, torch.float32, torch.float32)
        assert gradient.flatten().tolist() == [mean, mean]
