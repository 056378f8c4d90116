"""Hugging Face's `config.json` into a `DecoderConfig` and back; what our models cannot express is refused, by name.

A setting that this module doesn't know is refused too, unless it is off: it might change what the model computes.
"""

from collections.abc import Mapping
from typing import Any

from titan_models.config import DecoderConfig
from titan_models.families.llama3 import Llama3Config
from titan_models.families.qwen3 import Qwen3Config
from titan_models.foreign_settings import mistyped
from titan_models.shape import ModelConfigError, MoEConfig, RopeScaling

CONFIG_FILE = "config.json"
UNSAID = ("moe.z_loss",)
"""Fields of a configuration that the format has no place for; not refused, since they matter in training only."""

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
_CONTEXT = {"llama": 8192, "qwen3": 40_960, "qwen3_moe": 40_960}  # tokens; of the first published models
_LONG_CONTEXT = 131_072  # of the models that scale their frequencies

# What transformers takes where config.json is silent.
_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
}
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_context",
}
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_REQUIRED_EXPERTS = ("num_experts_per_tok", "moe_intermediate_size")
_READ = {
    *_DEFAULTS,
    *_REQUIRED,
    *_REQUIRED_EXPERTS,
    *("num_key_value_heads", "head_dim", "num_experts", "num_local_experts", "rope_parameters", "rope_scaling"),
    *("model_type", "architectures", "mlp_only_layers", "layer_types"),
}
# Setting -> the values that our models compute with; anything else is refused.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1, None),
    "decoder_sparse_step": (1, None),
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
    "rope_interleaved": (False, None),
}
# What says nothing about the numbers that a forward pass gives.
_IRRELEVANT = {
    *("transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "attention_dropout", "output_router_logits"),
    *("max_window_layers", "sliding_window", "output_hidden_states", "output_attentions", "return_dict", "id2label"),
    *("label2id", "chunk_size_feed_forward", "problem_type", "_attn_implementation", "attn_implementation"),
    *("unsloth_version", "unsloth_fixed", "auto_map"),
}


def from_hugging_face(values: Mapping[str, Any]) -> DecoderConfig:
    """The model that a `config.json` describes.

    Raises:
        ModelConfigError: listing everything that is missing, unknown, or no part of our models.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        raise ModelConfigError(
            f"{CONFIG_FILE} has model_type {kind!r}; those that can be converted are {', '.join(_ARCHITECTURES)}."
        )
    required = (*_REQUIRED, *(_REQUIRED_EXPERTS if kind == "qwen3_moe" else ()))
    problems = [f"{name} is missing" for name in required if name not in values]
    problems += _mistyped(values, kind) or _unmodelled(values)
    rope_theta, scaling = _rope(values, problems)
    if problems:
        raise ModelConfigError(f"{CONFIG_FILE} describes a model that cannot be converted: {'; '.join(problems)}.")
    get = _Settings(values)
    heads = get["num_attention_heads"]
    head_dim = values.get("head_dim") or (get["hidden_size"] // heads if kind == "llama" else 128)
    shared: dict[str, Any] = {
        "vocab_size": get["vocab_size"],
        "dim": get["hidden_size"],
        "layers": get["num_hidden_layers"],
        "heads": heads,
        "kv_heads": values.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "hidden_dim": get["intermediate_size"],
        "norm_eps": float(get["rms_norm_eps"]),
        "rope_theta": rope_theta,
        "rope_scaling": scaling,
        "tie_embeddings": bool(get["tie_word_embeddings"]),
        "init_std": float(get["initializer_range"]),
    }
    if kind == "llama":
        config: DecoderConfig = Llama3Config(**shared)
    else:
        config = Qwen3Config(**shared, moe=_experts(get) if kind == "qwen3_moe" else None)
    if problems := config.problems():
        raise ModelConfigError(f"{CONFIG_FILE} describes a model that cannot be built: {' '.join(problems)}")
    return config


def _mistyped(values: Mapping[str, Any], kind: str) -> list[str]:
    """What has not the type that everything below takes for granted; null is for what may be left out."""
    problems = mistyped(
        values,
        whole=(*_REQUIRED, "num_key_value_heads", "head_dim"),
        numbers=("rms_norm_eps", "initializer_range", "rope_theta"),
        flags=("tie_word_embeddings",),
        optional=("num_key_value_heads", "head_dim", "rope_theta", "tie_word_embeddings"),
    )
    if kind == "qwen3_moe":
        problems += mistyped(
            values,
            whole=(*_REQUIRED_EXPERTS, "num_experts", "num_local_experts"),
            numbers=("router_aux_loss_coef",),
            flags=("norm_topk_prob",),
            optional=("num_experts", "num_local_experts", "norm_topk_prob"),
        )
    for name, inside in (("mlp_only_layers", int), ("layer_types", str)):
        value = values.get(name)
        if value is not None and not (isinstance(value, list) and all(type(item) is inside for item in value)):
            problems.append(f"{name} is {value!r}, and a list of {inside.__name__} is expected")
    return problems


class _Settings(dict[str, Any]):
    """Settings with transformers' defaults."""

    def __missing__(self, name: str) -> Any:
        return _DEFAULTS[name]


def _unmodelled(values: Mapping[str, Any]) -> list[str]:
    known = _READ | _FIXED.keys() | _IRRELEVANT
    problems = [
        f"{name} is {values[name]!r}, and only {fine[0]!r} is modelled"
        for name, fine in _FIXED.items()
        if name in values and values[name] not in fine
    ]
    off = (None, False, [], {}, "")
    problems += [
        f"{name} is {value!r}, which is not known here"
        for name, value in values.items()
        if name not in known and value not in off
    ]
    if other := {kind for kind in values.get("layer_types") or () if kind != "full_attention"}:
        problems.append(f"layer_types has {', '.join(sorted(other))}, and only full_attention is modelled")
    dense = list(values.get("mlp_only_layers") or ())
    if sorted(dense) != list(range(len(dense))):
        problems.append(f"mlp_only_layers is {dense}, and only the first layers can be without experts")
    return problems


def _rope(values: Mapping[str, Any], problems: list[str]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies, from either of the two spellings that transformers has had."""
    spellings = {name: values[name] for name in ("rope_parameters", "rope_scaling") if values.get(name)}
    read = {name: _rope_spelling(name, rope, problems) for name, rope in spellings.items()}
    bases = {f"{name}.rope_theta": theta for name, (theta, _) in read.items() if theta is not None}
    if type(values.get("rope_theta")) in (int, float):
        bases["rope_theta"] = values["rope_theta"]
    if len(set(bases.values())) > 1:
        problems.append(" and ".join(f"{name} is {theta}" for name, theta in bases.items()) + ": they contradict")
    if len({scaling for _, scaling in read.values()}) > 1:
        problems.append("rope_parameters and rope_scaling describe different scalings: they contradict")
    theta = next(iter(bases.values()), _DEFAULTS["rope_theta"])
    if theta == 0:
        problems.append("rope_theta is 0, which is no base of frequencies")
    if problems:  # what follows is not used, and might be of any type
        return 0.0, None
    return float(theta), next((scaling for _, scaling in read.values()), None)


def _rope_spelling(name: str, values: Any, problems: list[str]) -> tuple[float | None, RopeScaling | None]:
    """Base, if it is there, and scaling."""
    if not isinstance(values, dict):
        problems.append(f"{name} is {values!r}, and an object is expected")
        return None, None
    rope = dict(values)
    theta = rope.pop("rope_theta", None)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    wrong = mistyped({"rope_theta": theta} | rope, numbers=("rope_theta", *_SCALING), optional=("rope_theta",))
    if wrong:
        problems += [f"in {name}, {problem}" for problem in wrong]
        return None, None
    problems += [
        f"{name} has {key} {value!r}, which is not known here"
        for key, value in rope.items()
        if key not in _SCALING and value not in _FIXED.get(key, (None,))
    ]
    if kind == "default":
        return theta, None
    if kind != "llama3":
        problems.append(f"the rope type is {kind!r}, and only 'default' and 'llama3' are modelled")
        return theta, None
    problems += [f"the rope scaling has no {name}" for name in _SCALING if name not in rope]
    given = {ours: float(rope[theirs]) for theirs, ours in _SCALING.items() if theirs in rope}
    original = int(given.pop("original_context", RopeScaling.original_context))
    return theta, RopeScaling(**given, original_context=original)


def _experts(get: _Settings) -> MoEConfig:
    return MoEConfig(
        experts=get.get("num_experts") or get.get("num_local_experts") or 128,
        top_k=get["num_experts_per_tok"],
        hidden_dim=get["moe_intermediate_size"],
        normalize_weights=bool(get["norm_topk_prob"]),
        first_dense_layers=len(get.get("mlp_only_layers") or ()),
        balance_loss=float(get["router_aux_loss_coef"]),
    )


def to_hugging_face(
    config: DecoderConfig, dtype: str = "float32", base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The `config.json` of a model.

    Args:
        config: the model.
        dtype: of its weights, in torch's words.
        base: a `config.json` that the model came with, of which what `config` doesn't say is kept.

    Raises:
        ModelConfigError: listing everything that transformers' model of the family has no place for.
    """
    kind = model_type(config)
    if problems := _unexportable(config, kind):
        raise ModelConfigError(f"transformers' {_ARCHITECTURES[kind]} cannot express this model: {' '.join(problems)}")
    values: dict[str, Any] = dict(base or {})
    values |= {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
    }
    values.setdefault("max_position_embeddings", _CONTEXT[kind] if config.rope_scaling is None else _LONG_CONTEXT)
    values["dtype" if "dtype" in values else "torch_dtype"] = dtype
    values.pop("layer_types", None)  # all alike, and as many as there are layers
    values |= _rope_settings(config, values)
    if (moe := config.moe) is not None:
        values.pop("num_local_experts", None)
        values |= {
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.hidden_dim,
            "norm_topk_prob": moe.normalize_weights,
            "router_aux_loss_coef": moe.balance_loss,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(range(moe.first_dense_layers)),
        }
    return values


def model_type(config: DecoderConfig) -> str:
    """Hugging Face's name of a model's family.

    Raises:
        ModelConfigError: if it has none.
    """
    if isinstance(config, Llama3Config):
        return "llama"
    if isinstance(config, Qwen3Config):
        return "qwen3" if config.moe is None else "qwen3_moe"
    raise ModelConfigError(f"transformers' models have no counterpart for {type(config).__name__}.")


def _rope_settings(config: DecoderConfig, base: Mapping[str, Any]) -> dict[str, Any]:
    """In each of the spellings that `base` has."""
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        rope = {
            "rope_type": "llama3",
            **{theirs: getattr(scaling, ours) for theirs, ours in _SCALING.items()},
        }
    older = {"rope_theta": config.rope_theta, "rope_scaling": None if scaling is None else rope}
    if "rope_parameters" not in base:
        return older
    newer = {"rope_parameters": rope | {"rope_theta": config.rope_theta}}
    return newer | {name: value for name, value in older.items() if name in base}


def _unexportable(config: DecoderConfig, kind: str) -> list[str]:
    problems = []
    if config.qk_norm != (kind != "llama"):
        problems.append(f"model.qk_norm is {config.qk_norm}.")
    if kind == "llama" and config.moe is not None:
        problems.append("model.moe is set.")
    if kind != "llama" and config.rope_scaling is not None:
        problems.append("model.rope_scaling is set.")
    if (moe := config.moe) is not None:
        plain = {"score": "softmax", "route_scale": 1.0, "groups": 1, "shared_hidden_dim": 0, "bias_update_rate": 0.0}
        problems += [
            f"model.moe.{name} is {getattr(moe, name)!r}, not {value!r}."
            for name, value in plain.items()
            if getattr(moe, name) != value
        ]
    return problems
