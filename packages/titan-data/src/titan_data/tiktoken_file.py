"""Tokenizers given as tiktoken rank files: each line a token's bytes in base64, and its rank.

Meta's `tokenizer.model` for Llama 3 is recognised by its 128,000 ranks. It does not hold its pattern and its 256
special tokens; they are those of https://github.com/meta-llama/llama-models (models/llama3/tokenizer.py), under the
names that Llama 3.1 and later give them. Any other rank file takes a `tiktoken.json` beside it:

    {"pattern": "...", "special_tokens": {"<|endoftext|>": 100257}}
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tiktoken
from numpy.typing import NDArray

from titan_data.errors import DataError
from titan_data.special_tokens import find_special_tokens
from titan_data.tiktoken_engine import TiktokenEngine
from titan_data.tokenizer import PATTERN_FILE, rank_file

LLAMA3_RANKS = 128_000
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPECIAL = 256
# The others are <|reserved_special_token_0|>, 1, 2 and so on, in the places that are left.
_LLAMA3_NAMES = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


class TiktokenTokenizer:
    """A `Tokenizer` made of a rank file."""

    engine = "tiktoken"

    def __init__(self, files: Mapping[str, bytes], *, name: str) -> None:
        """Reads a tokenizer from the content of its files.

        Args:
            files: the rank file, and what was found beside it.
            name: where they come from, for messages.

        Raises:
            DataError: if this is no rank file, its pattern is unknown, or it has no end-of-text token.
        """
        self.files = dict(files)
        self.name = name
        ranks = _read_ranks(files[rank_file(files)], name)
        pattern, special = _pattern_and_special(files, len(ranks), name)
        self.vocab_size = max(*ranks.values(), *special.values()) + 1
        if clash := set(ranks.values()) & set(special.values()):
            raise DataError(f"{name}: the id {min(clash)} is both a rank and a special token in {PATTERN_FILE}.")
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise DataError(f"{name}: has no rank for the byte 0x{missing[0]:02x}, so that not every text has tokens.")
        try:
            self._encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        except ValueError as error:
            raise DataError(
                f"{name}: tiktoken cannot use it ({error}). Check the pattern in {PATTERN_FILE}."
            ) from error
        self._engine = TiktokenEngine(self._encoding)
        self._identity = f"\n{pattern}"
        self.bos_id, self.eos_id, self.pad_id = find_special_tokens(files, special.get, name=name)

    def __reduce__(self) -> tuple:
        return _restore, (self.files, self.name)

    @property
    def hash(self) -> str:
        """Made of the ranks, the pattern and the end-of-text token."""
        ranks = self.files[rank_file(self.files)]
        return hashlib.sha256(ranks + f"{self._identity}\neos {self.eos_id}".encode()).hexdigest()

    def speed_up(self) -> None:
        """There is nothing faster."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Returns each text's token ids, uint32 [T], with no special tokens among them or around them."""
        return self._engine.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of these tokens, special tokens by their names."""
        return self._encoding.decode(list(ids))

    def describe(self) -> str:
        """Returns one line about it."""
        return f"{self.name}: {self.vocab_size:,} tokens, end of text is {self.eos_id}, hash {self.hash[:12]}"


def _restore(files: Mapping[str, bytes], name: str) -> TiktokenTokenizer:
    return TiktokenTokenizer(files, name=name)


def llama3_special_tokens() -> dict[str, int]:
    """Returns the names and ids of Llama 3's special tokens."""
    reserved = iter(range(_LLAMA3_SPECIAL))
    names = (
        _LLAMA3_NAMES.get(place) or f"<|reserved_special_token_{next(reserved)}|>" for place in range(_LLAMA3_SPECIAL)
    )
    return {name: LLAMA3_RANKS + place for place, name in enumerate(names)}


def _pattern_and_special(files: Mapping[str, bytes], ranks: int, name: str) -> tuple[str, dict[str, int]]:
    if PATTERN_FILE not in files:
        if ranks == LLAMA3_RANKS:
            return LLAMA3_PATTERN, llama3_special_tokens()
        raise DataError(
            f"{name} has {ranks:,} ranks, so it is not Llama 3's ({LLAMA3_RANKS:,}), and no {PATTERN_FILE} stands "
            'beside it. Write one: {"pattern": "...", "special_tokens": {"<|endoftext|>": 100257}}.'
        )
    try:
        settings = json.loads(files[PATTERN_FILE])
        pattern, special = settings["pattern"], settings["special_tokens"]
        if not (isinstance(pattern, str) and special and all(isinstance(id, int) for id in special.values())):
            raise TypeError("the pattern must be text, and special_tokens an object of ids")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{PATTERN_FILE} beside {name} cannot be used ({type(error).__name__}: {error}). It must read "
            '{"pattern": "...", "special_tokens": {"<|endoftext|>": 100257}}.'
        ) from error
    return pattern, special


def _read_ranks(content: bytes, name: str) -> dict[bytes, int]:
    if content[:1] == b"\n":  # how a serialized protocol buffer with a list in its first field begins
        raise DataError(
            f"{name} is a SentencePiece model (as Llama 2 has), not a tiktoken file. Name the tokenizer.json of the "
            "same model."
        )
    ranks: dict[bytes, int] = {}
    seen: set[int] = set()
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise DataError(
                f"{name}, line {number}: not a token in base64 and its rank, as a tiktoken file has. Name a "
                "tokenizer.json or a tiktoken file."
            ) from None
        if token in ranks or rank in seen:
            raise DataError(f"{name}, line {number}: the token or the rank {rank} stands in an earlier line too.")
        ranks[token] = rank
        seen.add(rank)
    if not ranks:
        raise DataError(f"{name} is empty: it holds no ranks.")
    return ranks
