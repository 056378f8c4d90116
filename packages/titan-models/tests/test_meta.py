import dataclasses

import pytest

from titan_models.families.llama3 import PRESETS, Llama3Config
from titan_models.families.qwen3 import Qwen3Config
from titan_models.meta import from_meta, to_meta
from titan_models.shape import ModelConfigError, MoEConfig, RopeScaling

# As in Meta's repositories.
LLAMA_31_8B = {
    "dim": 4096,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 1024,
    "n_heads": 32,
    "n_kv_heads": 8,
    "n_layers": 32,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "vocab_size": 128256,
}
LLAMA_32_1B = LLAMA_31_8B | {"dim": 2048, "ffn_dim_multiplier": 1.5, "multiple_of": 256, "n_layers": 16}


def read(values, tied=False):
    return from_meta(values, vocab_size=128_256, tied=tied)


def test_published_files_are_the_presets():
    assert read(LLAMA_31_8B) == PRESETS["8b"]
    assert read(LLAMA_32_1B, tied=True) == PRESETS["1b"]  # whose scaling factor the file doesn't tell
    assert read(LLAMA_31_8B | {"vocab_size": -1}) == PRESETS["8b"]
    assert to_meta(PRESETS["8b"]) == LLAMA_31_8B


@pytest.mark.parametrize("name", ["1b", "3b", "8b", "70b", "405b"])
def test_every_published_size_survives_both_ways(name):
    config = PRESETS[name]
    assert read(to_meta(config), tied=config.tie_embeddings) == config


@pytest.mark.parametrize("hidden_dim", [1, 80, 768, 1001, 4097])
def test_any_width_of_the_feed_forward_layer_can_be_told(hidden_dim):
    config = Llama3Config(vocab_size=128_256, hidden_dim=hidden_dim, rope_scaling=RopeScaling(factor=3.0))
    assert read(to_meta(config)) == config


def test_what_is_missing_unknown_or_contradictory_is_listed():
    values = LLAMA_31_8B | {"moe_args": {}, "vocab_size": 7}
    del values["n_heads"]
    with pytest.raises(ModelConfigError) as raised:
        read(values)
    for words in ("n_heads is missing", "moe_args is {}", "vocab_size is 7, and the embedding has 128256 rows"):
        assert words in str(raised.value)
    with pytest.raises(ModelConfigError, match="cannot be built"):
        read(LLAMA_31_8B | {"n_kv_heads": 5})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Qwen3Config(), "Qwen3Config"),
        (Llama3Config(moe=MoEConfig()), "model.moe"),
        (Llama3Config(head_dim=64), "head_dim 64"),
        (Llama3Config(rope_scaling=dataclasses.replace(RopeScaling(), original_context=64)), "more than its factor"),
    ],
)
def test_what_the_format_cannot_express_is_refused(config, message):
    with pytest.raises(ModelConfigError, match=message):
        to_meta(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 0}, "n_heads is 0, and a whole number of at least 1 is expected"),
        ({"dim": "4096"}, "dim is '4096'"),
        ({"norm_eps": None}, "norm_eps is None, and a number of at least 0 is expected"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"use_scaled_rope": 1}, "use_scaled_rope is 1, and true or false is expected"),
    ],
)
def test_what_has_not_its_type_is_refused_by_name(changes, message):
    with pytest.raises(ModelConfigError) as raised:
        read(LLAMA_31_8B | changes)
    assert message in str(raised.value)
