"""The `params.json` of Meta's Llama releases into a `Llama3Config` and back.

It has neither the width of the feed-forward layer, which follows from a rule, nor whether the head is tied, nor (before
Llama 3.3) the factor of the rope scaling, which the code of each release fixed. The rule: "llama-models" by Meta,
`FeedForward`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from titan_models.config import DecoderConfig
from titan_models.families.llama3 import PRESETS, Llama3Config
from titan_models.foreign_settings import mistyped
from titan_models.shape import ModelConfigError, RopeScaling

PARAMS_FILE = "params.json"
_FACTOR = "rope_scaling_factor"
UNSAID = ("init_std",)
"""Fields of a configuration that the format has no place for."""
_KNOWN = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"),
    *("rope_theta", "use_scaled_rope", _FACTOR, "max_seq_len", "max_batch_size"),
}
_REQUIRED = ("dim", "n_layers", "n_heads")


def from_meta(values: Mapping[str, Any], *, vocab_size: int, tied: bool) -> Llama3Config:
    """The model that a `params.json` describes.

    Args:
        values: its content.
        vocab_size: rows of the embedding; some files say -1.
        tied: whether the head has the numbers of the embedding.

    Raises:
        ModelConfigError: listing everything that is missing or unknown.
    """
    problems = [f"{name} is missing" for name in _REQUIRED if name not in values]
    problems += mistyped(
        values,
        whole=(*_REQUIRED, "n_kv_heads", "multiple_of"),
        numbers=("ffn_dim_multiplier", "norm_eps", "rope_theta", _FACTOR),
        flags=("use_scaled_rope",),
        optional=("n_kv_heads", "ffn_dim_multiplier", "use_scaled_rope"),
    )
    if values.get("rope_theta") == 0:
        problems.append("rope_theta is 0, which is no base of frequencies")
    problems += [
        f"{name} is {value!r}, which is not known here" for name, value in values.items() if name not in _KNOWN
    ]
    if values.get("vocab_size", -1) not in (-1, vocab_size):
        problems.append(f"vocab_size is {values['vocab_size']}, and the embedding has {vocab_size} rows")
    if problems:
        raise ModelConfigError(f"{PARAMS_FILE} describes a model that cannot be converted: {'; '.join(problems)}.")
    config = Llama3Config(
        vocab_size=vocab_size,
        dim=values["dim"],
        layers=values["n_layers"],
        heads=values["n_heads"],
        kv_heads=values.get("n_kv_heads") or values["n_heads"],
        head_dim=values["dim"] // values["n_heads"],
        hidden_dim=_hidden_dim(values["dim"], values.get("multiple_of", 256), values.get("ffn_dim_multiplier")),
        norm_eps=float(values.get("norm_eps", 1e-5)),
        rope_theta=float(values.get("rope_theta", 10_000.0)),
        tie_embeddings=tied,
    )
    if values.get("use_scaled_rope"):
        config = dataclasses.replace(config, rope_scaling=RopeScaling(factor=_factor(values, config)))
    if problems := config.problems():
        raise ModelConfigError(f"{PARAMS_FILE} describes a model that cannot be built: {' '.join(problems)}")
    return config


def _factor(values: Mapping[str, Any], config: Llama3Config) -> float:
    if _FACTOR in values:
        return float(values[_FACTOR])
    for preset in PRESETS.values():
        if preset.rope_scaling is not None and dataclasses.replace(preset, rope_scaling=None) == config:
            return preset.rope_scaling.factor
    return RopeScaling().factor


def to_meta(config: DecoderConfig) -> dict[str, Any]:
    """The `params.json` of a model.

    Raises:
        ModelConfigError: listing everything that it has no place for.
    """
    problems = []
    if not isinstance(config, Llama3Config):
        problems.append(f"it is a {type(config).__name__}.")
    if config.qk_norm or config.moe is not None:
        problems.append("model.qk_norm or model.moe is set.")
    if config.head_dim * config.heads != config.dim:
        problems.append(f"model.head_dim {config.head_dim} is not model.dim / model.heads.")
    scaling = config.rope_scaling
    if scaling is not None and dataclasses.replace(scaling, factor=8.0) != RopeScaling():
        problems.append("model.rope_scaling differs from Llama 3's in more than its factor.")
    if problems:
        raise ModelConfigError(f"Meta's Llama format cannot express this model: {' '.join(problems)}")
    multiple_of, multiplier = _rule(config.dim, config.hidden_dim)
    values: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "n_kv_heads": config.kv_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": multiplier,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "use_scaled_rope": scaling is not None,
    }
    if scaling is not None and scaling.factor != RopeScaling().factor:
        values[_FACTOR] = scaling.factor
    return values


def _hidden_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    hidden = int(2 * 4 * dim / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * -(-hidden // multiple_of)


def _rule(dim: int, hidden_dim: int) -> tuple[int, float]:
    """`multiple_of` and `ffn_dim_multiplier` that give this width; those of the releases if they do."""
    for multiple_of in (1024, 4096, 256):
        for multiplier in (1.3, 1.2, 1.5, 1.0):
            if _hidden_dim(dim, multiple_of, multiplier) == hidden_dim:
                return multiple_of, multiplier
    return 1, (hidden_dim + 0.5) / int(2 * 4 * dim / 3)  # half a unit more, since the rule rounds down
