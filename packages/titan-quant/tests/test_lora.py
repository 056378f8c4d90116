import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from ranks import run_ranks
from titan_quant.config import LoRAConfig, QuantConfig
from titan_quant.convert import quantize
from titan_quant.linear import LowPrecisionLinear
from titan_quant.lora import TENSOR_PARALLEL, add_lora, merge_lora
from titan_quant.select import SelectionError

CONFIG = LoRAConfig(rank=4, alpha=8.0)


def build():
    torch.manual_seed(0)
    return nn.ModuleDict({"w1": nn.Linear(32, 64), "w2": nn.Linear(64, 32), "lm_head": nn.Linear(32, 10)})


def run(model, x):
    return model["lm_head"](model["w2"](F.silu(model["w1"](x))))


def adapted(*, quantized=False, trained=True):
    model = build()
    if quantized:
        quantize(model, QuantConfig(recipe="float8_rowwise", emulate=True, skip_small=False))
    adapters = add_lora(model, CONFIG)
    if trained:
        for name in adapters.parameters:
            model.get_parameter(name).data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return model, adapters


def test_new_adapters_change_nothing_and_are_all_that_is_trained():
    x = torch.randn(3, 32)
    expected = run(build(), x)
    model, adapters = adapted(trained=False)
    out = run(model, x)
    assert torch.equal(out, expected)
    out.sum().backward()
    names = ["w1.lora_a", "w1.lora_b", "w2.lora_a", "w2.lora_b"]
    assert list(adapters.parameters) == names
    assert [name for name, p in model.named_parameters() if p.grad is not None] == names
    assert adapters.layers == ("w1", "w2")


def test_what_is_added_has_rules_to_start_from():
    model, adapters = adapted(trained=False)
    assert adapters.init["w1.lora_a"] == ("normal", 1 / math.sqrt(3 * 32))
    assert adapters.init["w2.lora_a"] == ("normal", 1 / math.sqrt(3 * 64))
    assert adapters.init["w2.lora_b"] == ("constant", 0.0)
    assert model["w1"].lora_b.count_nonzero() == 0
    assert model["w2"].lora_a.std().item() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.2)


def test_no_name_changes_on_the_meta_device_either():
    names = list(build().state_dict())
    with torch.device("meta"):
        model = build()
    adapters = add_lora(model, CONFIG)
    assert [name for name in model.state_dict() if name not in adapters.parameters] == names
    assert model["w1"].lora_a.is_meta
    assert not model["w1"].weight.requires_grad


@pytest.mark.parametrize("quantized", [False, True])
def test_the_correction_is_added_to_what_the_layer_computes(quantized):
    model, _ = adapted(quantized=quantized)
    layer, x = model["w1"], torch.randn(5, 32)
    base = build()
    if quantized:
        quantize(base, QuantConfig(recipe="float8_rowwise", emulate=True, skip_small=False))
        assert isinstance(layer, LowPrecisionLinear)
    expected = base["w1"](x) + 2.0 * x @ layer.lora_a.T @ layer.lora_b.T
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.lora_a.grad.count_nonzero() > 0


def test_roles_and_names_choose_and_what_does_not_fit_is_refused():
    roles = {"w1": "colwise", "w2": "rowwise", "lm_head": "head"}
    assert add_lora(build(), LoRAConfig(rank=2, roles=("rowwise",)), roles).layers == ("w2",)
    assert add_lora(build(), LoRAConfig(rank=2, roles=("rowwise",), include=("lm_*",)), roles).layers == (
        "w2",
        "lm_head",
    )
    with pytest.raises(SelectionError, match=r"lora\.exclude.*'w3'"):
        add_lora(build(), LoRAConfig(rank=2, exclude=("w3",)))
    with pytest.raises(SelectionError, match=r"nothing in the model has the role 'gate'"):
        add_lora(build(), LoRAConfig(rank=2, roles=("gate",)), roles)
    with pytest.raises(SelectionError, match=r"No layer .*its role is head"):
        add_lora(build(), LoRAConfig(rank=2, roles=("colwise",), exclude=("w*",)), roles)
    with pytest.raises(ValueError, match=r"lora\.rank is -1"):
        add_lora(build(), LoRAConfig(rank=-1))
    assert add_lora(build(), LoRAConfig()).layers == ()


def test_merged_weights_compute_what_adapters_do():
    model, _ = adapted()
    merged = merge_lora(model.state_dict(), CONFIG)
    plain = build()
    plain.load_state_dict(merged)
    x = torch.randn(3, 32)
    torch.testing.assert_close(run(plain, x), run(model, x))
    assert merged["w1.bias"] is model.state_dict()["w1.bias"] or torch.equal(merged["w1.bias"], model["w1"].bias)
    half = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    assert merge_lora(half, CONFIG)["w1.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("quantized", [False, True])
def test_sharded_adapters_train_as_whole_ones_and_can_be_merged(quantized):
    x, target = torch.randn(2, 4, 32), torch.randn(2, 4, 10)

    def train(model, *rows):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            for row in rows:
                (run(model, x[row]) - target[row]).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict()

    expected = train(adapted(quantized=quantized)[0], 0, 1)

    def rank():
        model, _ = adapted(quantized=quantized)
        for module in model.values():
            fully_shard(module)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)
        state = train(model, dist.get_rank())
        merged = merge_lora(state, CONFIG)["w2.weight"]
        return {name: tensor.full_tensor() for name, tensor in state.items()}, merged.full_tensor()

    for state, merged in run_ranks(2, rank):
        assert state.keys() == expected.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merged, merge_lora(expected, CONFIG)["w2.weight"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("role", ["colwise", "rowwise"])
def test_adapters_can_be_cut_as_is_said(role):
    """What each rank of two computes with its parts, added up or put side by side, is the whole; and its gradients."""
    model, _ = adapted()
    layer, x, grad = model["w1"], torch.randn(5, 32), torch.randn(5, 64)
    layer(x).backward(grad)
    cut = TENSOR_PARALLEL[role]
    outputs, gradients = [], []
    for rank in range(2):
        part = adapted()[0]["w1"]
        part.bias = None
        for name, dim in (("weight", 0 if role == "colwise" else 1), *cut.items()):
            if dim is not None:
                setattr(part, name, nn.Parameter(getattr(part, name).detach().chunk(2, dim)[rank].clone()))
        out = part(x if role == "colwise" else x.chunk(2, 1)[rank])
        out.backward(grad.chunk(2, 1)[rank] if role == "colwise" else grad)
        outputs.append(out)
        gradients.append((part.lora_a.grad, part.lora_b.grad))
    out = torch.cat(outputs, 1) if role == "colwise" else outputs[0] + outputs[1]
    torch.testing.assert_close(out + layer.bias, layer(x))
    for i, name in enumerate(("lora_a", "lora_b")):
        first, second = gradients[0][i], gradients[1][i]
        whole = first + second if cut[name] is None else torch.cat([first, second], cut[name])
        torch.testing.assert_close(whole, getattr(layer, name).grad)
