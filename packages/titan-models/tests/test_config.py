import dataclasses
import re
import subprocess
import sys

import pytest
import torch

from titan_models.config import ModelConfigError, MoEConfig


def test_all_contradictions_are_listed_at_once(tiny):
    broken = dataclasses.replace(tiny, heads=5, head_dim=7)
    found = broken.problems()
    assert len(found) == 2
    assert "model.heads 5 is not a multiple of model.kv_heads 2" in found[0]
    assert "model.head_dim 7 is odd" in found[1]
    with pytest.raises(ModelConfigError, match=r"model\.heads 5.*model\.head_dim 7"):
        broken.build()


def test_sizes_below_one_are_named(tiny):
    (problem,) = dataclasses.replace(tiny, layers=0).problems()
    assert "model.layers is 0" in problem


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"experts": 0}, "model.moe.experts is 0; it must be at least 1."),
        ({"top_k": 0}, "model.moe.top_k is 0; it must be at least 1."),
        ({"hidden_dim": 0}, "model.moe.hidden_dim is 0; it must be at least 1."),
        ({"groups": 0}, "model.moe.groups is 0; it must be at least 1."),
        ({"top_groups": 0}, "model.moe.top_groups is 0; it must be at least 1."),
        ({"shared_hidden_dim": -1}, "model.moe.shared_hidden_dim is -1; it must be at least 0."),
        ({"first_dense_layers": -1}, "model.moe.first_dense_layers is -1; it must be at least 0."),
        ({"first_dense_layers": 2}, "model.moe.first_dense_layers 2 leaves none of the 2 layers"),
        ({"balance_loss": -0.1}, "model.moe.balance_loss is -0.1; it must be at least 0."),
        ({"z_loss": float("nan")}, "model.moe.z_loss is nan; it must be at least 0."),
        ({"bias_update_rate": -1e-3}, "model.moe.bias_update_rate is -0.001; it must be at least 0."),
        ({"route_scale": 0.0}, "model.moe.route_scale is 0.0; it must be more than 0."),
        ({"score": "relu"}, "model.moe.score is 'relu'; choose one of softmax, sigmoid."),
        ({"grouped_mm": "on"}, "model.moe.grouped_mm is 'on'; choose one of auto, grouped, loop."),
        ({"top_k": 9}, "model.moe.top_k 9 is more than model.moe.experts 8"),
        ({"groups": 2, "top_groups": 2}, "model.moe.top_groups 2 of model.moe.groups 2 excludes no group"),
        ({"top_groups": 2}, "model.moe.top_groups 2 of model.moe.groups 1 excludes no group"),
        ({"groups": 3}, "model.moe.groups 3 does not cut model.moe.experts 8 into equal groups"),
        ({"groups": 8}, "model.moe.groups 8 does not cut model.moe.experts 8 into equal groups of two or more"),
        ({"groups": 4, "top_k": 3}, "model.moe.top_k is 3, but model.moe.top_groups 1 leaves a token only 2 experts"),
    ],
)
def test_experts_that_cannot_be_are_refused_by_name(tiny, changes, problem):
    (found,) = dataclasses.replace(tiny, moe=MoEConfig(**changes)).problems()
    assert found.startswith(problem)


MIXTURES = [
    None,
    MoEConfig(),
    MoEConfig(first_dense_layers=1, shared_hidden_dim=8, bias_update_rate=0.1, groups=2),
]


def fits(pattern, name):
    return re.fullmatch(re.escape(pattern).replace(r"\*", "[^.]+"), name)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("moe", MIXTURES)
def test_roles_and_rules_fit_what_the_model_has(tiny, moe, qk_norm):
    config = dataclasses.replace(tiny, moe=moe, qk_norm=qk_norm)
    assert config.problems() == []
    with torch.device("meta"):
        model = config.build()
    modules = dict(model.named_modules())
    for pattern in config.roles():
        assert any(fits(pattern, name) for name in modules), pattern
    for name, module in modules.items():
        if next(module.parameters(recurse=False), None) is not None:
            assert any(fits(pattern, name) for pattern in config.roles()), name
    for name, _ in (*model.named_parameters(), *model.named_buffers()):
        assert any(fits(pattern, name) for pattern in config.init_rules()), name


def test_layers_that_write_to_the_residual_stream_start_smaller(tiny):
    rules = dataclasses.replace(tiny, moe=MoEConfig(first_dense_layers=1, shared_hidden_dim=8)).init_rules()
    smaller = {name for name, rule in rules.items() if rule == ("normal", 0.01)}  # 0.02 / sqrt(2 * 2 layers)
    assert smaller == {
        "layers.*.attention.wo.weight",
        "layers.*.feed_forward.w2.weight",
        "layers.*.moe.shared.w2.weight",
        "layers.*.moe.experts.w2",
    }


def test_configuration_and_facts_import_no_torch():
    code = (
        "import sys; from titan_models.families import llama3, qwen3; import titan_models.facts as f; "
        "[f.parameter_count(c) for c in (*llama3.PRESETS.values(), *qwen3.PRESETS.values())]; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
