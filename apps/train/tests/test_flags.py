import dataclasses
import json
import re

import pytest

from titan_data.mixture_config import MixtureConfig, WeightChange
from titan_data.validation_config import ValidationConfig
from titan_train.cli import run
from titan_train.config_file import to_json
from titan_train.configs.llama3 import llama3_debug
from titan_train.flags import mapping_of


@pytest.fixture
def printed(tmp_path, capsys):
    """What --print-config says of a configuration that holds mappings, with these flags."""
    base = llama3_debug()
    mixture = MixtureConfig(
        sources={"a": "x", "b": "y"},
        weights={"a": 2, "b": 1},
        changes=(WeightChange(step=4, weights={"a": 1, "b": 1}),),
    )
    data = dataclasses.replace(base.data, kind="mixture", mixture=mixture)
    config = dataclasses.replace(base, data=data, validation=ValidationConfig(sets={"held": "h"}))
    (tmp_path / "held.json").write_text(to_json(config))

    def printed(*flags, config=tmp_path / "held.json"):
        assert run(["--config", str(config), "--print-config", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    return printed


def test_pairs_replace_a_whole_mapping_whatever_it_held(printed):
    assert printed("--validation.sets", "news", "n.jsonl", "code", "c/")["validation"]["sets"] == {
        "news": "n.jsonl",
        "code": "c/",
    }
    assert printed("--validation.sets", "news", "n", config="llama3_debug")["validation"]["sets"] == {"news": "n"}
    assert printed("--validation.sets")["validation"]["sets"] == {}
    assert printed()["validation"]["sets"] == {"held": "h"}


def test_a_value_has_the_type_of_the_field_and_not_of_what_stood_there(printed):
    mixture = printed("--data.mixture.weights", "a", "2.5", "b", "1")["data"]["mixture"]
    assert mixture["weights"] == {"a": 2.5, "b": 1}
    change = printed("--data.mixture.changes.0.weights", "a", "0.5", "b", "1e-1")["data"]["mixture"]["changes"][0]
    assert change["weights"] == {"a": 0.5, "b": 0.1}


def test_help_shows_pairs_and_what_stands_there(printed, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for config, sets, weights in (("llama3_debug", "none", "none"), (tmp_path / "held.json", "held h", "a 2.0 b 1.0")):
        with pytest.raises(SystemExit):
            run(["--config", str(config), "--help"])
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        defaults = dict(re.findall(r"--(\S+) \[NAME (?:STR|FLOAT) \.\.\.\] .*?\(default: (.*?)\)", text))
        assert defaults["validation.sets"] == sets
        assert defaults["data.mixture.weights"] == weights


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "x", "a", "y"], "the name 'a' is given twice"),
        (["a", "x", "b"], "the last name, 'b', has no value"),
    ],
)
def test_a_name_is_given_once_and_with_a_value(words, message, capsys):
    with pytest.raises(ValueError, match=message):
        mapping_of(words, str)
    for flag in ("--data.mixture.sources", "--validation.sets"):
        with pytest.raises(SystemExit) as ended:
            run([flag, *words])
        assert ended.value.code == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
