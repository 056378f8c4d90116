"""Which tokens begin, end and fill up a text: as the files beside a tokenizer say, else by their usual names."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from titan_data.errors import DataError
from titan_data.tokenizer import SETTINGS_FILES

_USUAL_NAMES = {
    "bos": ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>"),
    "eos": ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>"),
    "pad": ("<|pad|>", "<pad>", "<|finetune_right_pad_id|>"),
}


class SpecialTokens(NamedTuple):
    """Ids of the tokens that a training run needs to know."""

    bos: int | None
    eos: int
    pad: int | None


def find_special_tokens(
    files: Mapping[str, bytes], token_to_id: Callable[[str], int | None], *, name: str
) -> SpecialTokens:
    """Finds the special tokens of a tokenizer.

    Args:
        files: what stands beside it, by name; the first of `SETTINGS_FILES` that speaks of a token decides.
        token_to_id: looks a token up in the vocabulary.
        name: what the tokenizer is called, for messages.

    Raises:
        DataError: if nothing ends a text, or a file names a token that is not there.
    """
    settings = [_settings(files, file, name) for file in SETTINGS_FILES]
    bos, eos, pad = (_find(role, settings, token_to_id, name) for role in ("bos", "eos", "pad"))
    if eos is None:
        raise DataError(
            f"{name} has no end-of-text token: no companion file names one, and none of "
            f"{', '.join(_USUAL_NAMES['eos'])} is in its vocabulary. Put a tokenizer_config.json beside it with "
            'the line {"eos_token": "..."}.'
        )
    return SpecialTokens(bos, eos, pad)


def _settings(files: Mapping[str, bytes], file: str, name: str) -> dict[str, Any]:
    try:
        settings = json.loads(files.get(file, b"{}"))
    except ValueError as error:
        raise DataError(f"{file} beside {name} is not JSON ({error}).") from error
    return settings if isinstance(settings, dict) else {}


def _find(role: str, settings: list[dict[str, Any]], token_to_id: Callable[[str], int | None], name: str) -> int | None:
    for setting in settings:
        named = setting.get(f"{role}_token")
        content = named.get("content") if isinstance(named, dict) else named
        if content is not None:
            token = token_to_id(content)
            if token is None:
                raise DataError(f"{name}: its {role}_token {content!r} is not in its vocabulary.")
            return token
    ids = (token_to_id(usual) for usual in _USUAL_NAMES[role])
    return next((token for token in ids if token is not None), None)
