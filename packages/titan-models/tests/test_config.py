import dataclasses
import subprocess
import sys

import pytest

from titan_models.config import ModelConfigError


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


def test_configuration_and_facts_import_no_torch():
    code = (
        "import sys; from titan_models.families.llama3 import PRESETS; import titan_models.facts as f; "
        "[f.parameter_count(c) for c in PRESETS.values()]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
