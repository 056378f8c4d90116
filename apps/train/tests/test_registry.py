import sys

import pytest

from titan_train.config_file import to_json
from titan_train.configs.llama3 import llama3_debug
from titan_train.registry import RegistryError, builtin_modules, load_config

MINE = '''
import dataclasses
from titan_train.config import TrainConfig, TrainingConfig
from titan_train.configs.llama3 import llama3_debug

def mine():
    """Mine."""
    return dataclasses.replace(llama3_debug(), training=TrainingConfig(steps=5))

def needs_something(x):
    return x

def wrong():
    return 3
'''


def test_built_in():
    assert "llama3" in builtin_modules()
    assert load_config("llama3", "llama3_debug") == llama3_debug()


def test_a_python_file_needs_no_installation(tmp_path):
    (tmp_path / "my_runs.py").write_text(MINE)
    assert load_config(str(tmp_path / "my_runs.py"), "mine").training.steps == 5


def test_an_importable_module_beside_the_user(tmp_path, monkeypatch):
    (tmp_path / "module_beside.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))  # which the registry extends
    assert load_config("module_beside", "mine").training.steps == 5


def test_a_config_json_is_a_configuration_too(tmp_path):
    (tmp_path / "config.json").write_text(to_json(llama3_debug()))
    assert load_config("llama3", str(tmp_path / "config.json")) == llama3_debug()


def test_only_functions_without_arguments_that_the_module_defines_count(tmp_path):
    (tmp_path / "my_runs.py").write_text(MINE)
    with pytest.raises(RegistryError, match="It has: mine, wrong"):
        load_config(str(tmp_path / "my_runs.py"), "needs_something")
    with pytest.raises(RegistryError, match=r"wrong\(\) returned a int; expected a TrainConfig"):
        load_config(str(tmp_path / "my_runs.py"), "wrong")


def test_unknown_modules_are_refused():
    with pytest.raises(RegistryError, match=r"is not a module that Python finds\. Did you mean llama3"):
        load_config("lama3", "x")
    with pytest.raises(RegistryError, match="does not exist"):
        load_config("/nowhere/runs.py", "x")


def test_an_error_inside_a_users_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import not_installed_anywhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        load_config("broken_module", "x")


def test_a_run_directory_is_not_its_configuration_but_nearly(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RegistryError, match=r"is a run directory; give .*config\.json"):
        load_config("llama3", str(tmp_path))


@pytest.mark.parametrize("name", ["json", "torch", "sys"])
def test_a_file_that_would_hide_a_module_is_refused(tmp_path, monkeypatch, name):
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` does
    with pytest.raises(RegistryError, match=f"has the name of another module, {name}"):
        load_config(str(tmp_path / f"{name}.py"), "mine")
    assert getattr(sys.modules.get(name), "__file__", None) != str(tmp_path / f"{name}.py")


def test_a_file_on_the_path_hides_nothing(tmp_path, monkeypatch):
    (tmp_path / "my_runs.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_config("my_runs.py", "mine").training.steps == 5
