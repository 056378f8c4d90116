"""Tokenizers: text to token ids and back, with what a run must know of them and must keep.

The only kind so far is Hugging Face's `tokenizer.json`, read by the `tokenizers` library. Text is always only text
here: a document that contains the characters "<|end_of_text|>" does not contain the token.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from titan_data.errors import DataError, NotFoundError

TOKENIZER_FILE = "tokenizer.json"
# What may stand beside it. Saved along, so that other libraries find the tokenizer complete.
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

# What the special tokens are called where no companion file says so.
_USUAL_NAMES = {
    "bos": ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>"),
    "eos": ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>"),
    "pad": ("<|pad|>", "<pad>", "<|finetune_right_pad_id|>"),
}


_THREADS = "TOKENIZERS_PARALLELISM"
_threads_used_by: int | None = None


class Tokenizer(Protocol):
    """Text to token ids and back."""

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
        """Name and content of the files from which it can be loaded again."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns each text's token ids, with no special tokens among them or around them."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of these tokens, special tokens by their names."""
        ...

    def describe(self) -> str:
        """Returns one line about it."""
        ...


class HuggingFaceTokenizer:
    """The tokenizer that a `tokenizer.json` defines."""

    def __init__(self, files: Mapping[str, bytes], *, name: str) -> None:
        """Reads a tokenizer from the content of its files.

        Args:
            files: `tokenizer.json` and what was found beside it.
            name: where they come from, for messages.

        Raises:
            DataError: if this is no tokenizer, has no end-of-text token, or would read one out of plain text.
        """
        self.files = dict(files)
        self.name = name
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self.files[TOKENIZER_FILE])
        except Exception as error:  # the library raises nothing more special
            raise DataError(
                f"{name} is not a tokenizer that the `tokenizers` library {tokenizers.__version__} can read ({error}). "
                "Name the tokenizer.json of a Hugging Face fast tokenizer, or the folder that holds it."
            ) from error
        # Settings for feeding models one text at a time; here they would cut documents short, or inject tokens.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True

        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        settings = [self._settings(companion) for companion in _COMPANIONS[:2]]
        self.bos_id = self._special_token("bos", settings)
        self.pad_id = self._special_token("pad", settings)
        eos_id = self._special_token("eos", settings)
        if eos_id is None:
            raise DataError(
                f"{name} has no end-of-text token: no companion file names one, and none of "
                f"{', '.join(_USUAL_NAMES['eos'])} is in its vocabulary. Put a tokenizer_config.json beside it with "
                'the line {"eos_token": "..."}.'
            )
        self.eos_id = eos_id
        self._check_injection()

    @property
    def hash(self) -> str:
        """Made of the bytes of `tokenizer.json` and the end-of-text token."""
        return hashlib.sha256(self.files[TOKENIZER_FILE] + f"\neos {self.eos_id}".encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns each text's token ids, with no special tokens among them or around them."""
        with library_threads():
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of these tokens, special tokens by their names."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def describe(self) -> str:
        """Returns one line about it."""
        return f"{self.name}: {self.vocab_size:,} tokens, end of text is {self.eos_id}, hash {self.hash[:12]}"

    def _settings(self, companion: str) -> dict[str, Any]:
        try:
            settings = json.loads(self.files.get(companion, b"{}"))
        except ValueError as error:
            raise DataError(f"{companion} beside {self.name} is not JSON ({error}).") from error
        return settings if isinstance(settings, dict) else {}

    def _special_token(self, role: str, settings: list[dict[str, Any]]) -> int | None:
        """The id of a special token as the companion files name it, or by its usual names."""
        for setting in settings:
            named = setting.get(f"{role}_token")
            content = named.get("content") if isinstance(named, dict) else named
            if content is not None:
                token = self._tokenizer.token_to_id(content)
                if token is None:
                    raise DataError(f"{self.name}: its {role}_token {content!r} is not in its vocabulary.")
                return token
        ids = (self._tokenizer.token_to_id(name) for name in _USUAL_NAMES[role])
        return next((token for token in ids if token is not None), None)

    def _check_injection(self) -> None:
        """Refuses a model (such as Unigram) that finds the name of a special token in plain text by itself."""
        unknown = getattr(self._tokenizer.model, "unk_token", None)  # what plain text may well become
        for token, added in self._tokenizer.get_added_tokens_decoder().items():
            plain = self._tokenizer.encode(added.content, add_special_tokens=False).ids
            if added.special and added.content != unknown and token in plain:
                raise DataError(
                    f"{self.name} turns the plain text {added.content!r} into its special token {token}, so that a "
                    "document could pretend to end. Use a tokenizer that keeps them apart, such as a byte-level BPE."
                )


def load_tokenizer(path: Path) -> HuggingFaceTokenizer:
    """Loads a `tokenizer.json`, or the one in a folder, with what stands beside it.

    Raises:
        NotFoundError: if there is none.
        DataError: if it cannot be used.
    """
    path = path.expanduser()
    if not path.exists():
        raise NotFoundError(
            f"data.tokenizer {str(path)!r} does not exist (looked from the folder {Path.cwd()}). Name a tokenizer.json "
            "or its folder, or 'bpe' to train one on the corpus."
        )
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise NotFoundError(f"the folder {path}, named by data.tokenizer, holds no {TOKENIZER_FILE}")
    beside = {name: file.with_name(name) for name in _COMPANIONS}
    try:
        files = {TOKENIZER_FILE: file.read_bytes()} | {
            name: companion.read_bytes() for name, companion in beside.items() if companion.is_file()
        }
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {file}: {error}. Check its permissions.") from error
    return HuggingFaceTokenizer(files, name=str(path))


@contextlib.contextmanager
def library_threads() -> Generator[None]:
    """Lets the `tokenizers` library use all cores within the block, and one after it.

    Its threads do not survive a fork: a child that went on to use them would hang. So the library warns at each
    fork, unless its environment variable is set. Where the user has set it, it stays as it is.
    """
    global _threads_used_by
    ours = _THREADS not in os.environ or _threads_used_by == os.getpid()
    if not ours or os.environ.get(_THREADS) == "true":
        yield
        return
    _threads_used_by = os.getpid()
    os.environ[_THREADS] = "true"
    try:
        yield
    finally:
        os.environ[_THREADS] = "false"
