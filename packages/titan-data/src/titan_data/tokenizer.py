"""What a tokenizer is, and how one is loaded: text to token ids and back, with what a run must know and must keep.

Text is always only text here: a document that contains the characters "<|end_of_text|>" does not contain the token.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from titan_data.errors import DataError, NotFoundError

TOKENIZER_FILE = "tokenizer.json"
RANK_FILE = "tokenizer.model"
PATTERN_FILE = "tiktoken.json"
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_RANK_SUFFIX = ".tiktoken"
# What may stand beside it. Saved along, so that other libraries find the tokenizer complete.
_COMPANIONS = (*SETTINGS_FILES, PATTERN_FILE, "chat_template.jinja")


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


def load_tokenizer(path: Path) -> Tokenizer:
    """Loads a tokenizer from a file, or from the folder that holds it, with what stands beside it.

    Args:
        path: a `tokenizer.json`; a tiktoken file of ranks, such as Llama 3's `tokenizer.model` (any other has a
            `tiktoken.json` beside it, see `tiktoken_file.py`); or a folder, in which they are looked for in this order.

    Raises:
        NotFoundError: if there is none.
        DataError: if it cannot be used.
    """
    path = path.expanduser()
    if not path.exists():
        raise NotFoundError(
            f"data.tokenizer {str(path)!r} does not exist (looked from the folder {Path.cwd()}). Name a tokenizer.json "
            "or a tiktoken file, or the folder of one, or 'bpe' to train one on the corpus."
        )
    file = _file_in(path) if path.is_dir() else path
    name = TOKENIZER_FILE if file.suffix == ".json" else file.name
    beside = {name: file.with_name(name) for name in _COMPANIONS}
    try:
        files = {name: file.read_bytes()} | {
            name: companion.read_bytes() for name, companion in beside.items() if companion.is_file()
        }
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {file}: {error}. Check its permissions.") from error
    return tokenizer_from_files(files, name=str(path))


def tokenizer_from_files(files: Mapping[str, bytes], *, name: str) -> Tokenizer:
    """Makes a tokenizer from the content of its files.

    Args:
        files: `tokenizer.json` or a file of ranks, and what was found beside it.
        name: where they come from, for messages.

    Raises:
        DataError: if it cannot be used.
    """
    # Each loads a library of its own.
    if TOKENIZER_FILE in files:
        from titan_data.hugging_face_tokenizer import HuggingFaceTokenizer

        return HuggingFaceTokenizer(files, name=name)
    from titan_data.tiktoken_file import TiktokenTokenizer

    return TiktokenTokenizer(files, name=name)


def rank_file(files: Mapping[str, bytes]) -> str:
    """Returns which of a tokenizer's files holds its ranks.

    Raises:
        DataError: if it is none of them.
    """
    names = [name for name in files if name not in (TOKENIZER_FILE, *_COMPANIONS)]
    if len(names) != 1:
        raise DataError(
            f"a tokenizer has one file of ranks; among {', '.join(files) or 'no files'} there are {len(names)}."
        )
    return names[0]


def _file_in(folder: Path) -> Path:
    ranks = sorted(folder.glob(f"*{_RANK_SUFFIX}"))
    for file in (folder / TOKENIZER_FILE, folder / RANK_FILE, *ranks[:1]):
        if file.is_file():
            if file in ranks and len(ranks) > 1:
                raise DataError(
                    f"the folder {folder} holds {len(ranks)} {_RANK_SUFFIX} files. Name one with data.tokenizer."
                )
            return file
    raise NotFoundError(
        f"the folder {folder}, named by data.tokenizer, holds no {TOKENIZER_FILE}, {RANK_FILE} or *{_RANK_SUFFIX}"
    )
