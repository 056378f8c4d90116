import pytest

from titan_quant.formats import FORMATS
from titan_quant.policy import torch_dtype
from titan_quant.recipes import OPERANDS, RECIPES, RecipeError, resolve_recipe


@pytest.mark.parametrize(("capability", "device"), [(None, "cpu"), ((7, 0), "cuda"), ((10, 0), "cuda")])
def test_no_recipe_runs_anywhere(capability, device):
    assert resolve_recipe("none", capability, device) is RECIPES["none"]


@pytest.mark.parametrize("name", ["float8_rowwse", "rowwise", "FLOAT8_ROWWISE", "", "bf16"])
def test_an_unknown_name_is_refused_with_all_names(name):
    with pytest.raises(RecipeError, match=r"float8_tensorwise, .*param_dtype"):
        resolve_recipe(name, None, "cpu")


def test_a_misspelt_name_says_which_was_meant():
    with pytest.raises(RecipeError, match=r"did you mean 'float8_rowwise'\?"):
        resolve_recipe("float8_rowwse", None, "cpu")


@pytest.mark.parametrize(
    ("name", "capability", "nearest"),
    [
        ("float8_tensorwise", (8, 0), "none"),  # A100
        ("float8_rowwise_with_gw_hp", (8, 6), "none"),  # RTX 3090
        ("mxfp8", (8, 9), "float8_rowwise"),  # L40S
        ("nvfp4", (9, 0), "float8_rowwise"),  # H100
        ("nvfp4", (12, 0), "float8_rowwise"),  # RTX 5090: a higher number, but no superset
        ("nvfp4", None, "none"),
    ],
)
def test_lacking_hardware_names_what_is_needed_and_what_would_run(name, capability, nearest):
    device = "cuda" if capability else "cpu"
    with pytest.raises(RecipeError, match="needs an NVIDIA GPU of compute capability") as refusal:
        resolve_recipe(name, capability, device)
    assert f"this is a {device} device" in str(refusal.value)
    assert f"The nearest one that runs here is {nearest!r}; with quant.emulate" in str(refusal.value)
    assert "{}.{}".format(*RECIPES[name].capability) in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "capability"),
    [("float8_tensorwise", (8, 9)), ("float8_rowwise", (12, 0)), ("mxfp8", (10, 0)), ("nvfp4", (10, 3))],
)
def test_hardware_that_will_do_is_accepted(name, capability):
    assert resolve_recipe(name, capability, "cuda") is RECIPES[name]


@pytest.mark.parametrize("name", RECIPES)
def test_emulated_every_recipe_runs_anywhere(name):
    assert resolve_recipe(name, None, "cpu", emulate=True) is RECIPES[name]
    assert resolve_recipe(name, (7, 0), "cuda", emulate=True) is RECIPES[name]


@pytest.mark.parametrize(
    ("name", "spans"),
    [
        ("none", ["none"] * 3),
        ("float8_tensorwise", ["the micro-batch"] * 3),
        ("float8_rowwise", ["none", "none", "the micro-batch"]),
        ("float8_rowwise_with_gw_hp", ["none"] * 3),
        ("mxfp8", ["none", "none", "32 tokens"]),
        ("nvfp4", ["the micro-batch"] * 3),
    ],
)
def test_it_is_known_which_scales_span_tokens(name, spans):
    assert list(RECIPES[name].token_scales().values()) == spans


def test_the_way_to_round_scales_reaches_every_cast():
    recipe = RECIPES["mxfp8"].with_rounding("even")
    assert {cast.rounding for product in OPERANDS for cast in recipe.casts(product)} == {"even"}
    assert RECIPES["none"].with_rounding("even") == RECIPES["none"]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_the_facts_hang_together(recipe):
    assert recipe.simpler in RECIPES
    for product in OPERANDS:
        for cast in recipe.casts(product) or ():
            assert torch_dtype(cast.format).itemsize == 1  # two values of four bits share a byte
            assert cast.format in FORMATS
            assert (cast.block > 0) == (cast.scope == "block")
            assert cast.block == 0 or recipe.multiple % cast.block == 0
    if recipe.gathers_weights:
        # One rounding of the weight, for both products that need it.
        assert recipe.output[1] == recipe.grad_input[1]
        assert recipe.output[1].scope == "tensor"
