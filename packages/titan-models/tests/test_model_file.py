import dataclasses
import json

import pytest

from titan_models.families.llama3 import PRESETS as LLAMA3
from titan_models.families.qwen3 import PRESETS as QWEN3
from titan_models.families.qwen3 import Qwen3Config
from titan_models.model_file import differences, from_json, to_json
from titan_models.shape import ModelConfigError, MoEConfig, RopeScaling


@pytest.mark.parametrize("config", [LLAMA3["1b"], LLAMA3["8b"], QWEN3["4b"], QWEN3["30b-a3b"]])
def test_there_and_back_is_the_same_model(config):
    assert from_json(to_json(config)) == config


def test_how_a_model_is_computed_is_not_carried():
    config = Qwen3Config(loss_chunk_tokens=7, moe=MoEConfig(grouped_mm="loop", top_k=3))
    text = to_json(config)
    assert "loss_chunk_tokens" not in text
    assert "grouped_mm" not in text
    assert from_json(text) == Qwen3Config(moe=MoEConfig(top_k=3))


def test_fields_that_are_missing_have_their_defaults():
    body = json.loads(to_json(LLAMA3["8b"]))
    del body["norm_eps"]
    assert from_json(json.dumps(body)) == LLAMA3["8b"]


def changed(**changes):
    return json.dumps(json.loads(to_json(LLAMA3["8b"])) | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        (changed(type="nowhere:Config"), "nowhere:Config, which cannot be imported"),
        (changed(type="json:loads"), "json:loads, which is no dataclass"),
        (changed(type="titan_models.shape:RopeScaling"), "doesn't know: dim"),
        (changed(colour="red"), "fields that Llama3Config doesn't know: colour"),
        (changed(layers="many"), "model.layers in model.json is 'many'"),
        (changed(layers=True), "model.layers in model.json is True"),
        (changed(rope_scaling=8), "model.rope_scaling in model.json is 8"),
    ],
)
def test_what_cannot_be_read_is_named(text, message):
    with pytest.raises(ModelConfigError, match=message.replace(".", r"\.")):
        from_json(text)


def test_a_class_that_is_no_model_is_refused():
    with pytest.raises(ModelConfigError, match="holds a RopeScaling"):
        from_json(to_json(dataclasses.replace(RopeScaling())))


def test_differences_are_listed_by_field():
    one = Qwen3Config(moe=MoEConfig(top_k=3), loss_chunk_tokens=7)
    assert differences(one, one) == differences(one, Qwen3Config(moe=MoEConfig(top_k=3, grouped_mm="loop"))) == []
    other = Qwen3Config(dim=512, moe=MoEConfig(top_k=4, z_loss=1.0), norm_eps=1.0)
    found = differences(one, other, unsaid=("moe.z_loss",))
    assert found == ["dim: 256 and 512", "moe.top_k: 3 and 4", f"norm_eps: {one.norm_eps} and 1.0"]
    (scaling,) = differences(LLAMA3["8b"], dataclasses.replace(LLAMA3["8b"], rope_scaling=None))
    assert scaling.startswith("rope_scaling: (factor 8.0, low_frequency_factor 1.0")
    assert scaling.endswith("and None")
