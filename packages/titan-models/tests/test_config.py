import dataclasses
import re
import subprocess
import sys

import pytest
import torch

from titan_models.shape import MoEConfig

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
