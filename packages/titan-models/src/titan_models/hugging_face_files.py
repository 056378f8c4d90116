"""The small files beside the weights of a folder that transformers loads: which model it is, which tokens it uses."""

import json
from collections.abc import Mapping
from typing import Any

from titan_models.config import DecoderConfig
from titan_models.hugging_face import CONFIG_FILE, to_hugging_face

GENERATION_FILE = "generation_config.json"

_TOKENIZER = "tokenizer.json"
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")  # the first that speaks of a token decides
_ROLES = ("bos", "eos", "pad")


def settings_files(
    config: DecoderConfig, dtype: str, carried: Mapping[str, bytes], tokens: Mapping[str, int] | None = None
) -> dict[str, bytes]:
    """`generation_config.json` and `config.json`, the latter last: a folder with one is complete.

    Args:
        config: the model.
        dtype: of its weights, in torch's words.
        carried: the content of the files that the model came with, by name. Of a `config.json` of transformers' what
            `config` doesn't say is kept, a `generation_config.json` is kept whole; else the tokenizer's files say which
            tokens are special.
        tokens: names of `config.json`, such as `eos_token_id`, where the caller knows better than the files.

    Raises:
        ModelConfigError: if transformers' model of the family cannot express this one.
    """
    base = _object(carried, CONFIG_FILE)
    if "model_type" not in base:  # a training run's own configuration has the same name
        base = special_tokens(carried, config.vocab_size)
    values = to_hugging_face(config, dtype, {**base, **(tokens or {})})
    special = {f"{role}_token_id": values.get(f"{role}_token_id") for role in _ROLES}
    generation = {name: value for name, value in special.items() if value is not None}
    return {
        GENERATION_FILE: carried.get(GENERATION_FILE) or _json({"_from_model_config": True, **generation}),
        CONFIG_FILE: _json(values),
    }


def special_tokens(files: Mapping[str, bytes], vocab_size: int) -> dict[str, int]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id`, those of them that the files of a tokenizer name.

    Args:
        files: those of a tokenizer, by name; without a `tokenizer.json`, or one that names tokens, nothing is found.
        vocab_size: tokens that the model knows; others would be of another tokenizer and are left out.
    """
    settings = [_object(files, name) for name in _SETTINGS]
    ids = _ids(_object(files, _TOKENIZER))
    found = {}
    for role in _ROLES:
        names = (_content(each.get(f"{role}_token")) for each in settings)
        name = next((name for name in names if name is not None), None)
        if isinstance(name, str) and name in ids and ids[name] < vocab_size:
            found[f"{role}_token_id"] = ids[name]
    return found


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        values = json.loads(files.get(name, b"{}"))
    except ValueError:
        return {}  # kept as it is for whoever reads it, but nothing can be known from it
    return values if isinstance(values, dict) else {}


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _ids(tokenizer: Mapping[str, Any]) -> dict[Any, int]:
    """Token -> id, of any kind of model that the `tokenizers` library has."""
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # with a score each
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}}
