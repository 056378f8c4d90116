import itertools
import subprocess
import sys

import pytest
import torch

from titan_quant.config import LoRAConfig, MixedPrecision, QuantConfig
from titan_quant.policy import torch_dtype

NAMES = ("bfloat16", "float32", "float64")


@pytest.mark.parametrize(
    ("policy", "resolved"),
    [
        (MixedPrecision(), ("float32", "float32", "float32")),
        (MixedPrecision(param_dtype="bfloat16"), ("float32", "bfloat16", "float32")),
        (MixedPrecision(param_dtype="bfloat16", reduce_dtype="bfloat16"), ("float32", "bfloat16", "bfloat16")),
        (MixedPrecision(master_dtype="bfloat16"), ("bfloat16", "bfloat16", "float32")),
        (MixedPrecision(master_dtype="float64"), ("float64", "float64", "float64")),
        (MixedPrecision(master_dtype="float64", param_dtype="bfloat16"), ("float64", "bfloat16", "float32")),
    ],
)
def test_defaults_follow_from_what_is_given(policy, resolved):
    assert policy.resolved() == resolved


def test_the_rules_are_those_of_torchs_promotion():
    """Checks every combination against `promote_types`, which knows nothing of our order of names."""

    def fits(narrow, wide):
        return torch.promote_types(torch_dtype(narrow), torch_dtype(wide)) == torch_dtype(wide)

    for master, param, reduce in itertools.product(NAMES, repeat=3):
        policy = MixedPrecision(master_dtype=master, param_dtype=param, reduce_dtype=reduce)
        assert (policy.problems() == []) == (fits(param, master) and fits(param, reduce))
        if fits(param, master):
            *_, default = MixedPrecision(master_dtype=master, param_dtype=param).resolved()
            assert torch_dtype(default) == torch.promote_types(torch_dtype(param), torch.float32)


def test_all_problems_are_listed_at_once():
    policy = MixedPrecision(master_dtype="bfloat16", param_dtype="float64", reduce_dtype="float32")
    problems = policy.problems()
    assert len(problems) == 2
    assert "param_dtype is float64, wider than master_dtype" in problems[0]
    assert "reduce_dtype is float32, narrower than param_dtype" in problems[1]
    with pytest.raises(ValueError, match=r"param_dtype.*reduce_dtype"):
        policy.resolved()


def test_unknown_dtypes_are_listed_at_once():
    problems = MixedPrecision(master_dtype="bf16", param_dtype="float16", reduce_dtype=None).problems()
    assert len(problems) == 2
    assert all("bfloat16, float32, float64" in problem for problem in problems)
    assert "'bf16'" in problems[0]


def test_a_master_dtype_cannot_be_left_empty():
    assert len(MixedPrecision(master_dtype=None).problems()) == 1


def test_an_unknown_recipe_is_a_problem_and_a_registered_one_is_not():
    assert QuantConfig().problems() == QuantConfig(recipe="mxfp8").problems() == []
    (problem,) = QuantConfig(recipe="mxfp9").problems()
    assert problem.startswith("quant.recipe is 'mxfp9'.")
    assert "did you mean 'mxfp8'?" in problem


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (QuantConfig(recipe="mxfp8", scale_rounding="up"), "one of floor, rceil, ceil, even"),
        (
            QuantConfig(recipe="mxfp8", scale_rounding="even"),
            "no kernel for GPUs; use rceil or floor, or quant.emulate",
        ),
        (QuantConfig(recipe="float8_rowwise", scale_rounding="floor"), "for the recipe mxfp8, not for float8_rowwise"),
        (QuantConfig(recipe="nvfp4", experts=True), "use one of float8_rowwise, mxfp8"),
        (QuantConfig(recipe="float8_rowwise", float8_gather=True), "use float8_tensorwise, or leave it out"),
        (QuantConfig(include=("lm_head",)), "quant.include has no effect without a quant.recipe"),
        (LoRAConfig(rank=-2), "lora.rank is -2"),
        (LoRAConfig(rank=2, alpha=0.0), "lora.alpha is 0.0"),
        (LoRAConfig(exclude=("lm_head",)), "lora.exclude has no effect without a lora.rank"),
    ],
)
def test_what_cannot_take_effect_is_a_problem(config, told):
    (problem,) = config.problems()
    assert told in problem


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(recipe="mxfp8", scale_rounding="even", emulate=True, experts=True, include=("lm_head",)),
        QuantConfig(recipe="float8_tensorwise", float8_gather=True),
        LoRAConfig(),
        LoRAConfig(rank=8, alpha=1.0, include=("*.gate",)),
    ],
)
def test_what_can_is_none(config):
    assert config.problems() == []


def test_adapters_are_scaled_by_alpha_over_rank():
    assert LoRAConfig(rank=8, alpha=4.0).scale == 0.5


@pytest.mark.parametrize("module", ["config", "recipes", "flops"])
def test_importing_costs_no_torch(module):
    code = f"import sys, titan_quant.{module}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
