"""What a tokenizer is: text to token ids and back, with what a run must know and must keep.

Text is always only text here: a document that contains the characters "<|end_of_text|>" does not contain the token.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from titan_data.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
PATTERN_FILE = "tiktoken.json"
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
# What may stand beside it. Saved along, so that other libraries find the tokenizer complete.
COMPANIONS = (*SETTINGS_FILES, PATTERN_FILE, "chat_template.jinja")


class Tokenizer(Protocol):
    """Text to token ids and back. It can be pickled, so that other processes may tokenize too."""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, if there is one."""
        ...

    @property
    def eos_id(self) -> int:
        """The token that ends each document."""
        ...

    @property
    def pad_id(self) -> int | None:
        """The token for filling up, if there is one."""
        ...

    @property
    def hash(self) -> str:
        """Equal for tokenizers that make the same stream of tokens from the same documents."""
        ...

    @property
    def files(self) -> Mapping[str, bytes]:
        """Name and content of the files from which `tokenizer_from_files` makes it again."""
        ...

    @property
    def engine(self) -> str:
        """What encodes text, and why not something faster: a few words for messages."""
        ...

    def speed_up(self) -> None:
        """Takes a second or two to encode a lot of text faster; what it returns stays the same."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Returns each text's token ids, uint32 [T], with no special tokens among them or around them."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of these tokens, special tokens by their names."""
        ...

    def describe(self) -> str:
        """Returns one line about it."""
        ...


def rank_file(files: Mapping[str, bytes]) -> str:
    """Returns which of a tokenizer's files holds its ranks.

    Raises:
        DataError: if it is none of them.
    """
    names = [name for name in files if name not in (TOKENIZER_FILE, *COMPANIONS)]
    if len(names) != 1:
        raise DataError(
            f"a tokenizer has one file of ranks; among {', '.join(files) or 'no files'} there are {len(names)}."
        )
    return names[0]
