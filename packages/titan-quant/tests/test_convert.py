import pytest
import torch
from torch import nn

from titan_quant.config import QuantConfig
from titan_quant.convert import quantize
from titan_quant.linear import LowPrecisionLinear
from titan_quant.recipes import RECIPES, RecipeError
from titan_quant.select import SelectionError


class Experts(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(2, hidden, 64))

    def grouped_product(self, x, weight, counts):
        return torch.cat([rows @ own.T for rows, own in zip(x.split(counts.tolist()), weight, strict=True)])

    def forward(self, x, counts):
        return self.grouped_product(x, self.w1, counts)


class Model(nn.Module):
    def __init__(self, hidden: int = 96) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.odd = nn.Linear(64, 40)
        self.experts = Experts(hidden)
        self.lm_head = nn.Linear(64, 128)


def emulated(recipe, **settings):
    return QuantConfig(recipe=recipe, emulate=True, skip_small=False, **settings)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "none"])
def test_what_is_converted_and_what_is_not_is_told(name):
    model = Model()
    conversion = quantize(model, emulated(name))
    assert conversion.linears == ("layers.0", "layers.1", "layers.2")
    assert all(isinstance(layer, LowPrecisionLinear) for layer in model.layers)
    assert type(model.odd) is type(model.lm_head) is nn.Linear
    multiple = RECIPES[name].multiple
    assert conversion.skipped["odd"] == f"its 64 -> 40 features are not multiples of {multiple}"
    assert conversion.lines() == [
        "converted: layers.* (3)",
        "left alone (the head): lm_head",
        f"left alone (its 64 -> 40 features are not multiples of {multiple}): odd",
        "left alone (experts, and quant.experts is not set): experts",
    ]
    x = torch.randn(5, 64)
    assert not torch.equal(model.layers[0](x), nn.functional.linear(x, model.layers[0].weight, model.layers[0].bias))


def test_the_recipe_none_changes_nothing():
    model = Model()
    assert quantize(model, QuantConfig()).lines() == []
    assert type(model.layers[0]) is nn.Linear


@pytest.mark.parametrize("name", ["float8_rowwise", "mxfp8"])
def test_experts_are_converted_if_asked(name):
    model = Model()
    x, counts = torch.randn(9, 64), torch.tensor([4, 5])
    plain = model.experts(x, counts)
    conversion = quantize(model, emulated(name, experts=True))
    assert conversion.experts == ("experts",)
    assert not torch.equal(model.experts(x, counts), plain)
    excluded = quantize(Model(), emulated(name, experts=True, exclude=("experts",)))
    assert excluded.skipped["experts"] == "excluded by name"
    odd = quantize(Model(hidden=40), emulated(name, experts=True))
    assert "features are not multiples" in odd.skipped["experts"]


@pytest.mark.parametrize(
    ("name", "features", "worth"),
    [
        ("float8_tensorwise", (4096, 1024), False),
        ("float8_tensorwise", (4096, 2048), True),
        ("float8_rowwise", (4096, 2048), False),
        ("float8_rowwise", (1024, 8192), False),
        ("float8_rowwise", (4096, 4096), True),
        ("mxfp8", (4096, 4096), True),
    ],
)
def test_layers_too_small_to_gain_are_left_alone_by_their_whole_size(name, features, worth):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(*features), nn.Linear(8192, 8192))
    conversion = quantize(model, QuantConfig(recipe=name))
    assert ("0" in conversion.linears) == worth
    assert worth or conversion.skipped["0"].startswith("too small to gain")


def test_roles_and_names_choose():
    roles = {"layers.0": "colwise", "layers.1": "gate", "layers.2": "rowwise", "lm_head": "head"}
    conversion = quantize(Model(), emulated("mxfp8", include=("lm_head",), exclude=("layers.2",)), roles)
    assert conversion.linears == ("layers.0", "lm_head")
    with pytest.raises(SelectionError, match=r"'layer\.9'"):
        quantize(Model(), emulated("mxfp8", include=("layer.9",)), roles)


def test_a_recipe_that_would_do_nothing_is_refused():
    with pytest.raises(RecipeError, match=r"nothing to do .*too small to gain: 64 -> 64.*quant\.skip_small"):
        quantize(Model(), QuantConfig(recipe="mxfp8", emulate=True))


def test_hardware_is_asked_for_only_where_the_model_is():
    with pytest.raises(RecipeError, match="this is a cpu device"):
        quantize(Model(), QuantConfig(recipe="float8_rowwise", skip_small=False))
    with torch.device("meta"):
        model = Model()
    conversion = quantize(model, QuantConfig(recipe="float8_rowwise", skip_small=False))
    assert not model.layers[0].arithmetic.emulate
    assert conversion.linears


def test_all_problems_of_a_configuration_are_told():
    with pytest.raises(ValueError, match=r"quant\.experts.*quant\.float8_gather"):
        quantize(Model(), QuantConfig(recipe="float8_rowwise_with_gw_hp", experts=True, float8_gather=True))


def test_the_way_to_round_scales_reaches_the_layers():
    model = Model()
    quantize(model, emulated("mxfp8", scale_rounding="even"))
    assert model.layers[0].arithmetic.recipe.output[0].rounding == "even"


def test_weights_move_between_recipes_and_none():
    models = [Model() for _ in range(3)]
    quantize(models[0], emulated("mxfp8"))
    quantize(models[1], emulated("float8_tensorwise"))
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    x = torch.randn(3, 64)
    torch.testing.assert_close(models[1].layers[0](x), models[2].layers[0](x), rtol=0.1, atol=0.1)
    assert models[0].state_dict().keys() == models[2].state_dict().keys()
