import dataclasses
import json

import pytest

from titan_models.families.llama3 import PRESETS
from titan_train.config_file import ConfigFileError, read_config, to_json
from titan_train.configs import llama3
from titan_train.registry import config_functions


@pytest.mark.parametrize("name", config_functions(llama3))
def test_every_configuration_survives_the_round_trip(tmp_path, name):
    config = getattr(llama3, name)()
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    assert read_config(path) == config


def edited(tmp_path, edit):
    values = json.loads(to_json(llama3.llama3_debug()))
    edit(values)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v["training"].update(stepz=3), "TrainingConfig has no field 'stepz'. Did you mean 'steps'?"),
        (lambda v: v["training"].update(steps="3"), "steps is '3'; expected int"),
        (lambda v: v["training"].update(steps=True), "steps is True; expected int"),
        (lambda v: v.update(device="tpu"), "device is 'tpu'; expected 'auto' or 'cpu' or 'cuda'"),
        (lambda v: v["model"].update(type="nowhere:Model"), "needs nowhere:Model, which cannot be imported"),
        (lambda v: v["model"].update(type="os:getcwd"), "os:getcwd is not a dataclass"),
        (lambda v: v["model"].update(type=5), "needs 5, which cannot be imported"),
        (lambda v: v.update(model=None), "model is None; expected an object"),
        (lambda v: v.pop("model"), "missing 1 required keyword-only argument: 'model'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, edit, message):
    with pytest.raises(ConfigFileError) as error:
        read_config(edited(tmp_path, edit))
    assert message in str(error.value)


def test_fields_left_out_have_their_defaults(tmp_path):
    path = edited(tmp_path, lambda v: v.pop("metrics"))
    assert read_config(path) == llama3.llama3_debug()


def test_an_integer_is_taken_for_a_float(tmp_path):
    config = read_config(edited(tmp_path, lambda v: v["optimizer"].update(lr=1)))
    assert config.optimizer.lr == 1.0
    assert isinstance(config.optimizer.lr, float)


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ConfigFileError, match="No such file"):
        read_config(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    for content in (b"{", b"\xff", b"[" * 100_000):
        broken.write_bytes(content)
        with pytest.raises(ConfigFileError, match="is not JSON"):
            read_config(broken)
    model = tmp_path / "model.json"
    model.write_text(to_json(PRESETS["debug"]))
    with pytest.raises(ConfigFileError, match="holds a Llama3Config, not a TrainConfig"):
        read_config(model)


def test_nested_optional_sections_keep_their_type(tmp_path):
    config = llama3.llama3_8b()
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    scaling = read_config(path).model.rope_scaling
    assert dataclasses.asdict(scaling) == dataclasses.asdict(config.model.rope_scaling)


def test_a_name_given_twice_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(to_json(llama3.llama3_debug()).replace('"steps": 200', '"steps": 5, "steps": 200'))
    with pytest.raises(ConfigFileError, match="'steps' is given twice"):
        read_config(path)
