"""The tokenizer that a Hugging Face `tokenizer.json` defines, read by the `tokenizers` library.

A lot of text is encoded by tiktoken's engine, several times faster, if that gives the same tokens (`tiktoken_engine`).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tokenizers
from numpy.typing import NDArray

from titan_data.errors import DataError
from titan_data.special_tokens import find_special_tokens
from titan_data.threads import library_threads
from titan_data.tiktoken_engine import TiktokenEngine, Untranslatable, translate
from titan_data.tokenizer import TOKENIZER_FILE


class HuggingFaceTokenizer:
    """A `Tokenizer` made of a `tokenizer.json`."""

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
        self.bos_id, self.eos_id, self.pad_id = find_special_tokens(self.files, self._tokenizer.token_to_id, name=name)
        self._check_injection()
        self._fast: TiktokenEngine | None = None
        self.engine = "tokenizers"

    def __reduce__(self) -> tuple:
        # The other process need not find out again what this one has.
        return _restore, (self.files, self.name, self._fast is not None, self.engine)

    @property
    def hash(self) -> str:
        """Made of the bytes of `tokenizer.json` and the end-of-text token."""
        return hashlib.sha256(self.files[TOKENIZER_FILE] + f"\neos {self.eos_id}".encode()).hexdigest()

    def speed_up(self) -> None:
        """Goes over to tiktoken's engine, if it gives the same tokens for all that could tell them apart."""
        if self._fast is not None or self.engine != "tokenizers":
            return
        try:
            fast = translate(self._tokenizer)
            fast.check(self._tokenizer)
        except Untranslatable as reason:
            self.engine = f"tokenizers (not tiktoken, since {reason})"
        else:
            self._fast, self.engine = fast, "tiktoken"

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Returns each text's token ids, uint32 [T], with no special tokens among them or around them."""
        if self._fast is not None:
            return self._fast.encode_batch(texts)
        with library_threads():
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of these tokens, special tokens by their names."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def describe(self) -> str:
        """Returns one line about it."""
        return f"{self.name}: {self.vocab_size:,} tokens, end of text is {self.eos_id}, hash {self.hash[:12]}"

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


def _restore(files: Mapping[str, bytes], name: str, fast: bool, engine: str) -> HuggingFaceTokenizer:
    tokenizer = HuggingFaceTokenizer(files, name=name)
    tokenizer.engine = engine
    if fast:
        tokenizer._fast = translate(tokenizer._tokenizer)
    return tokenizer
