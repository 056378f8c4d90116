from dataclasses import replace

import pytest

from titan_quant.policy import torch_dtype
from titan_quant.recipes import RECIPES, RecipeError, resolve_recipe

LATER = {name: replace(recipe, available=True) for name, recipe in RECIPES.items()}
"""The registry as it will be when every recipe is built."""


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


@pytest.mark.parametrize("name", RECIPES.keys() - {"none"})
def test_a_recipe_that_is_not_built_says_so_even_on_the_right_hardware(name):
    with pytest.raises(
        RecipeError, match=r"not built in this version.*nearest one that runs here is 'none'"
    ) as refusal:
        resolve_recipe(name, RECIPES[name].capability, "cuda")
    assert "it needs" not in str(refusal.value)


def test_a_refusal_names_all_that_is_missing():
    with pytest.raises(RecipeError) as refusal:
        resolve_recipe("mxfp8", None, "cpu")
    assert "not built in this version" in str(refusal.value)
    assert "capability 10.0 to 10.x, and this is a cpu device." in str(refusal.value)


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
    with pytest.raises(RecipeError, match="needs an NVIDIA GPU of compute capability") as refusal:
        resolve_recipe(name, capability, "cuda", LATER)
    assert str(refusal.value).endswith(f"The nearest one that runs here is {nearest!r}.")
    assert "{}.{}".format(*RECIPES[name].capability) in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "capability"),
    [("float8_tensorwise", (8, 9)), ("float8_rowwise", (12, 0)), ("mxfp8", (10, 0)), ("nvfp4", (10, 3))],
)
def test_hardware_that_will_do_is_accepted(name, capability):
    assert resolve_recipe(name, capability, "cuda", LATER) is LATER[name]


def test_an_emulated_recipe_runs_on_anything():
    recipes = {**LATER, "mxfp8": replace(LATER["mxfp8"], emulated=True)}
    assert resolve_recipe("mxfp8", None, "cpu", recipes).emulated
    with pytest.raises(RecipeError, match="nearest one that runs here is 'mxfp8'"):
        resolve_recipe("nvfp4", None, "cpu", recipes)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_the_facts_hang_together(recipe):
    for name in filter(None, (recipe.forward_format, recipe.gradient_format)):
        assert torch_dtype(name).itemsize == 1  # two values of four bits share a byte
    assert recipe.simpler in RECIPES
