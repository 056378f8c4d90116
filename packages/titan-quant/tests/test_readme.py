from pathlib import Path

from readme import run_python
from titan_quant.recipes import RECIPES

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_runs_as_it_is_written(tmp_path):
    lines = run_python(README, tmp_path).splitlines()
    assert lines[0] == "converted: * (2)"
    assert lines[1].startswith("The recipe 'mxfp8' cannot be used")
    assert lines[2] == "['0.lora_a', '0.lora_b', '2.lora_a', '2.lora_b']"
    assert lines[3] == "{'high': 0.5, 'float8': 0.5}"
    assert "precision.param_dtype" in lines[4]
    assert "precision.reduce_dtype" in lines[5]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_its_table_of_what_spans_tokens_is_true():
    text = README.read_text()
    for name, recipe in RECIPES.items():
        if name != "none":
            assert f"| `{name}` | " + " | ".join(recipe.token_scales().values()) + " |" in text
