"""A corpus as a stream of tokens: found in the cache, or read and tokenized once.

corpus (content fingerprint) -> tokenizer (hash) -> token store, kept under the hash of both
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from titan_data.bpe import trained_bpe
from titan_data.cache import Progress, cache_directory, find_or_build
from titan_data.config import DataConfig
from titan_data.errors import DataError
from titan_data.sources import Corpus, open_corpus
from titan_data.token_store import TokenStore, build_store, open_store
from titan_data.tokenizer import Tokenizer, load_tokenizer

TRAINED = "bpe"

# Part of every fingerprint. It changes when the same documents and tokenizer come to give other tokens.
_STREAM = "titan-data stream 1"


@dataclass(frozen=True, kw_only=True)
class TokenDataset:
    """A tokenized corpus and the tokenizer it was made with; the `TokenStream` of a `BatchLoader`."""

    fingerprint: str
    """Equal if and only if documents, their order and the tokenizer are; wherever the files lie."""
    corpus: Corpus
    tokenizer: Tokenizer
    store: TokenStore

    @property
    def tokens(self) -> NDArray[np.unsignedinteger]:
        """All tokens: uint16 or uint32 [N], mapped from disk."""
        return self.store.tokens

    @property
    def document_starts(self) -> NDArray[np.int64]:
        """Where each document begins, then N: int64 [D + 1]."""
        return self.store.document_starts

    @property
    def eos_id(self) -> int:
        """The token that ends each document."""
        return self.tokenizer.eos_id

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self.tokenizer.vocab_size

    @property
    def token_count(self) -> int:
        """How many tokens, end-of-text tokens included."""
        return len(self.tokens)

    @property
    def document_count(self) -> int:
        """How many documents, not counting empty ones."""
        return len(self.document_starts) - 1

    def describe(self) -> str:
        """Returns a small tree of where the tokens come from."""
        meta = self.store.meta
        left_out = [
            f"{count:,} {what}"
            for count, what in (
                (meta.empty_documents, "empty documents left out"),
                (meta.skipped_files, "files skipped that are not UTF-8"),
            )
            if count
        ]
        documents = ", ".join([f"{self.token_count:,} tokens in {self.document_count:,} documents", *left_out])
        return (
            f"data {self.fingerprint[:12]}: {documents}\n"
            f"├── corpus: {self.corpus.describe()}\n"
            f"├── tokenizer: {self.tokenizer.describe()}\n"
            f"└── cache: {self.store.folder} ({meta.token_type}, {self.tokens.nbytes / 1e6:,.1f} MB)"
        )


def open_dataset(config: DataConfig, *, progress: Progress | None = None) -> TokenDataset:
    """Finds a corpus's tokens in the cache, or tokenizes it first; safe to call from many processes at once.

    Args:
        config: what to read, and where to keep it.
        progress: is called with a line of text about whatever takes time; nothing is printed by itself.

    Raises:
        NotFoundError: if the corpus or the tokenizer is not there.
        DataError: if one of them is malformed or empty, or the cache cannot be written.
    """
    progress = progress or (lambda message: None)
    cache = cache_directory(config.cache_dir)
    if config.tokenizer != TRAINED and config.vocab_size != DataConfig.vocab_size:
        raise DataError(
            f"data.vocab_size is {config.vocab_size}, but only a trained BPE has a vocabulary to choose the size of. "
            f"Leave it out, or set data.tokenizer to {TRAINED!r}."
        )
    corpus = open_corpus(
        config.source,
        format=config.format,
        text_field=config.text_field,
        memory=cache / "files",
        progress=progress,
    )
    if config.tokenizer == TRAINED:
        tokenizer = trained_bpe(corpus, config.vocab_size, cache / "tokenizers", progress=progress)
    else:
        tokenizer = load_tokenizer(Path(config.tokenizer))
    identity = f"{_STREAM}, corpus {corpus.fingerprint}, tokenizer {tokenizer.hash}"
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    store = find_or_build(
        cache / "tokens" / fingerprint[:32],
        open_folder=open_store,
        build=lambda folder: build_store(folder, corpus, tokenizer, progress=progress),
        what="token cache",
        progress=progress,
    )
    return TokenDataset(fingerprint=fingerprint, corpus=corpus, tokenizer=tokenizer, store=store)
