import copy

import torch
from torch import nn

from titan_quant.arithmetic import Arithmetic, linear
from titan_quant.linear import LowPrecisionLinear, convert_linear
from titan_quant.recipes import RECIPES

ARITHMETIC = Arithmetic(RECIPES["float8_rowwise"], emulate=True)


def test_a_converted_layer_keeps_its_parameters_hooks_and_place():
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 32, bias=False))
    model[1].weight = nn.Parameter(model[1].weight.detach())
    calls = []
    model[0].register_forward_hook(lambda *args: calls.append(1))
    before = dict(model.named_parameters())
    names = list(model.state_dict())
    convert_linear(model[0], ARITHMETIC)
    assert isinstance(model[0], LowPrecisionLinear)
    assert all(after is before[name] for name, after in model.named_parameters())
    assert list(model.state_dict()) == names
    model(torch.randn(2, 32))
    assert calls == [1]


def test_it_computes_the_product_and_adds_the_bias_unrounded():
    layer = nn.Linear(32, 16)
    x = torch.randn(4, 32)
    plain = layer(x)
    convert_linear(layer, ARITHMETIC)
    out = layer(x)
    assert torch.equal(out, linear(x, layer.weight, ARITHMETIC) + layer.bias)
    assert not torch.equal(out, plain)
    out.sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((16,), 4.0))


def test_autocast_casts_what_it_casts_for_a_linear_layer():
    layer = nn.Linear(32, 16)
    x = torch.randn(4, 32)
    convert_linear(layer, ARITHMETIC)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, linear(x.bfloat16(), layer.weight.bfloat16(), ARITHMETIC) + layer.bias.bfloat16())
    out.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_it_can_be_copied_and_says_what_it_is():
    layer = nn.Linear(32, 16)
    convert_linear(layer, ARITHMETIC)
    x = torch.randn(2, 32)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert "float8_e4m3fn by row" in repr(layer)
    assert "emulated" in repr(layer)
