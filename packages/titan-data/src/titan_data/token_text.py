"""What tokens stand for: which are control tokens, never written by text, and how much text the others are.

Read from the tokenizer's files, for each kind that `tokenizer.load_tokenizer` knows.
"""

import base64
import json
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from titan_data.tiktoken_file import llama3_special_tokens
from titan_data.tokenizer import PATTERN_FILE, TOKENIZER_FILE, Tokenizer, rank_file


class ControlToken(NamedTuple):
    """A special token, which takes the white space beside it along if it says so."""

    id: int
    takes_left: bool = False
    takes_right: bool = False


def control_tokens(tokenizer: Tokenizer) -> dict[str, ControlToken]:
    """Returns the special tokens of a tokenizer by name."""
    if TOKENIZER_FILE in tokenizer.files:
        return {
            token["content"]: ControlToken(token["id"], token["lstrip"], token["rstrip"])
            for token in _added(_json(tokenizer, TOKENIZER_FILE))
            if token["special"]
        }
    if PATTERN_FILE in tokenizer.files:
        special: dict[str, int] = _json(tokenizer, PATTERN_FILE)["special_tokens"]
    else:
        special = llama3_special_tokens()
    return {name: ControlToken(token) for name, token in special.items()}


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Returns how many bytes of UTF-8 text each token stands for: int64 [vocab size], 0 for control tokens.

    A token may hold part of a character, so these are bytes and not characters. They add up to a text's size, unless
    the tokenizer rewrites its text (a normalizer, a space put before it).
    """
    sizes = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    if TOKENIZER_FILE in tokenizer.files:
        settings = _json(tokenizer, TOKENIZER_FILE)
        by_bytes = '"ByteLevel"' in json.dumps([settings.get("decoder"), settings.get("pre_tokenizer")])
        vocab = settings["model"]["vocab"]
        tokens = vocab.items() if isinstance(vocab, dict) else ((text, id) for id, (text, _) in enumerate(vocab))
        for text, id in tokens:
            sizes[id] = len(text) if by_bytes else _piece_bytes(text)
        for token in _added(settings):
            sizes[token["id"]] = 0 if token["special"] else len(token["content"].encode())
    else:
        for line in tokenizer.files[rank_file(tokenizer.files)].splitlines():
            if line.strip():
                token, rank = line.split()
                sizes[int(rank)] = len(base64.b64decode(token))
    return sizes


def _piece_bytes(text: str) -> int:
    """The size of SentencePiece's piece, which has a sign of its own for a space, and names for single bytes."""
    if len(text) == len("<0x00>") and text.startswith("<0x") and text.endswith(">"):
        return 1
    return len(text.replace("▁", " ").encode())


def _added(settings: dict[str, Any]) -> list[dict[str, Any]]:
    return settings.get("added_tokens") or []


def _json(tokenizer: Tokenizer, name: str) -> dict[str, Any]:
    return json.loads(tokenizer.files[name])
