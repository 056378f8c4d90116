import ast
import dataclasses
import inspect
import subprocess
import sys

import pytest

from titan_data import (
    config,
    loader_config,
    mixture_config,
    sft_config,
    stream_config,
    validation_config,
)
from titan_data.config import DataConfig

MODULES = (config, loader_config, mixture_config, sft_config, stream_config, validation_config)


def test_importing_the_configs_loads_neither_torch_nor_numpy():
    names = ", ".join(module.__name__ for module in MODULES)
    code = f"import sys, {names}; print([m for m in ('torch', 'numpy', 'tokenizers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataConfig().source = "elsewhere"
    with pytest.raises(TypeError):
        DataConfig("elsewhere")


@pytest.mark.parametrize("module", MODULES)
def test_every_field_has_help(module):
    sections = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ClassDef)]
    assert sections
    for section in sections:
        fields = [i for i, node in enumerate(section.body) if isinstance(node, ast.AnnAssign)]
        assert len(fields) == len(dataclasses.fields(getattr(module, section.name)))
        for i in fields:
            following = section.body[i + 1]
            assert isinstance(following, ast.Expr), ast.unparse(section.body[i])
            assert isinstance(following.value, ast.Constant), ast.unparse(section.body[i])


def test_places_and_layout_are_not_part_of_what_is_computed():
    parts = {field.name: field.metadata.get("part", "what") for field in dataclasses.fields(DataConfig)}
    assert {name for name, part in parts.items() if part == "what"} == {
        "text_field",
        "template",
        "vocab_size",
        "confine_attention",
        "shuffle",
    }
    assert parts["tokenize_workers"] == "how"
