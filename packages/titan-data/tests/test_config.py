import ast
import dataclasses
import inspect
import math
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
from titan_data.mixture_config import MixtureConfig, WeightChange
from titan_data.sft_config import SFTConfig
from titan_data.stream_config import StreamConfig
from titan_data.validation_config import ValidationConfig

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


PROBLEMS = [
    (DataConfig(cache_dir=""), "data.cache_dir is empty"),
    (DataConfig(source=""), "data.source is empty"),
    (SFTConfig(date="26 Jul"), "data.sft.date is '26 Jul', which is no day"),
    (SFTConfig(date="20240726"), "data.sft.date is '20240726'"),
    (SFTConfig(template=""), "data.sft.template is empty"),
    (SFTConfig(too_long="cut"), "data.sft.too_long is 'cut'"),
    (StreamConfig(streams=0), "data.stream.streams is 0"),
    (ValidationConfig(sets={"": "x"}), "validation.sets has an empty name for 'x'"),
    (ValidationConfig(sets={"x": ""}), "validation.sets names no corpus for 'x'"),
    (MixtureConfig(sources={"": "x"}), "data.mixture.sources has an empty name for 'x'"),
    (MixtureConfig(sources={"a": "x"}, block_size=0), "data.mixture.block_size is 0"),
    (MixtureConfig(sources={"a": "x"}, weights={"a": math.nan}), "data.mixture.weights gives a nan"),
    (MixtureConfig(sources={"a": "x"}, weights={"a": math.inf}), "data.mixture.weights gives a inf"),
    (MixtureConfig(sources={"a": "x"}, weights={"a": -1.0}), "data.mixture.weights gives a -1.0"),
    (MixtureConfig(sources={"a": "x"}, weights={"a": 0.0}), "data.mixture.weights gives every source 0"),
    (
        MixtureConfig(sources={"a": "x"}, changes=(WeightChange(step=3, weights={"a": -1.0}),)),
        "the change of weights at step 3 gives a -1.0",
    ),
    (
        MixtureConfig(sources={"a": "x"}, changes=(WeightChange(step=0, weights={"a": 1.0}),)),
        "the change of weights at step 0 comes after step 0",
    ),
    (
        MixtureConfig(sources={"a": "x"}, changes=(WeightChange(step=3, weights={"a": 1.0}),) * 2),
        "the change of weights at step 3 comes after step 3",
    ),
]


@pytest.mark.parametrize(("section", "problem"), PROBLEMS, ids=[problem for _, problem in PROBLEMS])
def test_values_that_mean_nothing_are_said_at_once(section, problem):
    (found,) = section.problems()
    assert found.startswith(problem)


def test_a_default_has_no_problems():
    for section in (DataConfig(), SFTConfig(), StreamConfig(), ValidationConfig()):
        assert section.problems() == []
    weights = {"a": 0.0, "b": 2}
    changes = tuple(WeightChange(step=step, weights=weights) for step in (1, 5))
    assert MixtureConfig(sources={"a": "x", "b": "y"}, weights=weights, changes=changes).problems() == []


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
