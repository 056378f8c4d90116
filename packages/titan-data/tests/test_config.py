import ast
import dataclasses
import inspect
import subprocess
import sys

import pytest

from titan_data import config
from titan_data.config import DataConfig


def test_importing_the_config_loads_neither_torch_nor_numpy():
    code = "import sys, titan_data.config; print([m for m in ('torch', 'numpy', 'tokenizers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataConfig().source = "elsewhere"
    with pytest.raises(TypeError):
        DataConfig("elsewhere")


def test_every_field_has_help():
    body = ast.parse(inspect.getsource(config)).body
    (section,) = (node for node in body if isinstance(node, ast.ClassDef))
    fields = [i for i, node in enumerate(section.body) if isinstance(node, ast.AnnAssign)]
    assert len(fields) == len(dataclasses.fields(DataConfig))
    for i in fields:
        following = section.body[i + 1]
        assert isinstance(following, ast.Expr), ast.unparse(section.body[i])
        assert isinstance(following.value, ast.Constant), ast.unparse(section.body[i])


def test_places_and_layout_are_not_part_of_what_is_computed():
    parts = {field.name: field.metadata.get("part", "what") for field in dataclasses.fields(DataConfig)}
    assert {name for name, part in parts.items() if part == "what"} == {
        "text_field",
        "vocab_size",
        "confine_attention",
        "shuffle",
    }
    assert parts["prefetch"] == "how"
