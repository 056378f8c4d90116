"""config.json both ways, against transformers' own configurations; names of the weights against its models."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from titan_models.facts import shared_names, state_shapes
from titan_models.families import llama3, qwen3
from titan_models.hugging_face import from_hugging_face, model_type, to_hugging_face
from titan_models.shape import ModelConfigError, MoEConfig, RopeScaling

ALL = {**{f"llama3-{k}": v for k, v in llama3.PRESETS.items()}, **{f"qwen3-{k}": v for k, v in qwen3.PRESETS.items()}}
PUBLISHED_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}


@pytest.mark.parametrize("name", ALL)
def test_every_preset_survives_both_ways_and_transformers(name, tmp_path):
    config = ALL[name]
    values = to_hugging_face(config, "bfloat16")
    assert from_hugging_face(values) == config
    (tmp_path / "config.json").write_text(json.dumps(values))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)  # the newer spelling of the same
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in saved
    assert from_hugging_face(saved) == config
    assert saved["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["llama3-1b", "llama3-8b", "qwen3-4b", "qwen3-8b"])
def test_shapes_and_names_are_those_of_transformers(name):
    config = ALL[name]
    values = to_hugging_face(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    theirs = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    keys = llama3.HUGGING_FACE_KEYS if name.startswith("llama3") else qwen3.HUGGING_FACE_KEYS
    ours = {}
    for key, shape in {
        **state_shapes(config),
        **dict.fromkeys(shared_names(config), (config.vocab_size, config.dim)),
    }.items():
        layer = key.split(".")[1] if key.startswith("layers.") else ""
        entry = keys[key.replace(f".{layer}.", ".*.", 1)]
        ours[(entry if isinstance(entry, str) else entry[0]).replace("*", layer)] = shape
    assert ours == theirs


def test_a_published_config_is_understood():
    assert from_hugging_face(PUBLISHED_8B) == llama3.PRESETS["8b"]


def test_what_a_model_came_with_is_kept():
    values = to_hugging_face(llama3.PRESETS["8b"], "bfloat16", PUBLISHED_8B)
    assert values == PUBLISHED_8B | {"head_dim": 128}
    changed = dataclasses.replace(llama3.PRESETS["8b"], rope_theta=7.0, rope_scaling=None)
    values = to_hugging_face(changed, "float32", PUBLISHED_8B)
    assert (values["rope_theta"], values["rope_scaling"], values["torch_dtype"]) == (7.0, None, "float32")
    assert values["eos_token_id"] == PUBLISHED_8B["eos_token_id"]


def test_what_is_silent_has_transformers_defaults():
    bare = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    config = from_hugging_face({**bare, "intermediate_size": 48})
    theirs = LlamaConfig(**{**bare, "intermediate_size": 48})
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.kv_heads == theirs.num_key_value_heads
    assert config.head_dim == theirs.head_dim
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.tie_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    ("reference", "changes", "message"),
    [
        (LlamaConfig, {"attention_bias": True}, "attention_bias is True"),
        (LlamaConfig, {"mlp_bias": True}, "mlp_bias is True"),
        (LlamaConfig, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (LlamaConfig, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type is 'yarn'"),
        (LlamaConfig, {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "has no low_freq_factor"),
        (LlamaConfig, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LlamaConfig, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LlamaConfig, {"secret_sauce": 3}, "secret_sauce is 3, which is not known here"),
        (LlamaConfig, {"model_type": "mamba"}, "model_type 'mamba'"),
        (LlamaConfig, {"num_key_value_heads": 5}, "is not a multiple of"),
        (Qwen3Config, {"use_sliding_window": True}, "use_sliding_window is True"),
        (Qwen3Config, {"layer_types": ["sliding_attention"] * 32}, "layer_types has sliding_attention"),
        (Qwen3MoeConfig, {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        (Qwen3MoeConfig, {"mlp_only_layers": [3]}, "mlp_only_layers is [3]"),
    ],
)
def test_what_is_not_modelled_is_refused_by_name(reference, changes, message):
    values = reference().to_dict()
    if "rope_scaling" in changes:
        del values["rope_parameters"]
    with pytest.raises(ModelConfigError) as raised:
        from_hugging_face(values | changes)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": None}, "rms_norm_eps is None, and a number of at least 0 is expected"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4', and a whole number of at least 1 is expected"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', and true or false is expected"),
        ({"mlp_only_layers": 3}, "mlp_only_layers is 3, and a list of int is expected"),
        ({"layer_types": [["full_attention"]]}, "layer_types is "),
        ({"model_type": ["llama"]}, "model_type ['llama']"),
        ({"rope_theta": [1]}, "rope_theta is [1]"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_parameters": None, "rope_theta": "x"}, "rope_theta is 'x'"),
        ({"rope_parameters": [1]}, "rope_parameters is [1], and an object is expected"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": "8"}}, "in rope_parameters, factor is '8'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters has partial_rotary_factor 0.5"),
    ],
)
def test_what_has_not_its_type_is_refused_by_name(changes, message):
    with pytest.raises(ModelConfigError) as raised:
        from_hugging_face({**PUBLISHED_8B, "rope_scaling": None, **changes})
    assert message in str(raised.value)


def test_two_spellings_of_the_frequencies_must_agree():
    base = {name: value for name, value in PUBLISHED_8B.items() if name not in ("rope_scaling", "rope_theta")}
    scaling, theta = PUBLISHED_8B["rope_scaling"], PUBLISHED_8B["rope_theta"]
    both = {**base, "rope_parameters": scaling | {"rope_theta": theta}, "rope_scaling": scaling, "rope_theta": theta}
    assert from_hugging_face(both) == llama3.PRESETS["8b"]
    assert from_hugging_face({**both, "rope_scaling": None, "rope_theta": None}) == llama3.PRESETS["8b"]
    for changes, message in (
        ({"rope_theta": 1e4}, "rope_parameters.rope_theta is 500000.0 and rope_theta is 10000.0: they contradict"),
        ({"rope_scaling": scaling | {"factor": 2.0}}, "rope_parameters and rope_scaling describe different scalings"),
        ({"rope_scaling": {"type": "default"}}, "rope_parameters and rope_scaling describe different scalings"),
        ({"rope_scaling": scaling | {"rope_theta": 3.0}}, "rope_scaling.rope_theta is 3.0"),
    ):
        with pytest.raises(ModelConfigError) as raised:
            from_hugging_face(both | changes | {"attention_bias": True})
        assert message in str(raised.value)
        assert "attention_bias" in str(raised.value)
    changed = dataclasses.replace(llama3.PRESETS["8b"], rope_theta=7.0, rope_scaling=None)
    assert from_hugging_face(to_hugging_face(changed, "float32", both)) == changed


def test_all_problems_are_listed_at_once():
    values = LlamaConfig().to_dict() | {"attention_bias": True, "hidden_act": "relu"}
    del values["hidden_size"]
    with pytest.raises(ModelConfigError) as raised:
        from_hugging_face(values)
    assert all(word in str(raised.value) for word in ("attention_bias", "hidden_act", "hidden_size is missing"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (llama3.Llama3Config(qk_norm=True), "model.qk_norm is True"),
        (llama3.Llama3Config(moe=MoEConfig()), "model.moe is set"),
        (qwen3.Qwen3Config(qk_norm=False), "model.qk_norm is False"),
        (qwen3.Qwen3Config(rope_scaling=RopeScaling()), "model.rope_scaling is set"),
        (qwen3.Qwen3Config(moe=MoEConfig(score="sigmoid", route_scale=2.0)), "model.moe.score is 'sigmoid'"),
        (qwen3.Qwen3Config(moe=MoEConfig(bias_update_rate=0.1)), "model.moe.bias_update_rate is 0.1"),
    ],
)
def test_what_transformers_cannot_express_is_refused(config, message):
    with pytest.raises(ModelConfigError, match=message):
        to_hugging_face(config)


def test_dense_layers_before_the_experts_are_carried():
    config = qwen3.Qwen3Config(moe=MoEConfig(first_dense_layers=2, normalize_weights=False))
    assert to_hugging_face(config)["mlp_only_layers"] == [0, 1]
    assert from_hugging_face(to_hugging_face(config)) == config
    assert model_type(config) == "qwen3_moe"
