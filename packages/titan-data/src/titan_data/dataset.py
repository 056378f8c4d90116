"""A corpus as a stream of tokens: found in the cache or in a folder of titan-tokenize, or read and tokenized once.

source (content fingerprint) -> tokenizer (hash) -> token store, kept under the hash of both
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from titan_data.bpe import trained_bpe
from titan_data.cache import DamagedError, Progress, cache_directory, find_or_build
from titan_data.config import DataConfig
from titan_data.errors import DataError
from titan_data.manifest import is_token_folder
from titan_data.source import Source, source_bytes
from titan_data.sources import open_source
from titan_data.token_store import TokenStore, open_store
from titan_data.tokenizer import Tokenizer
from titan_data.tokenizer_files import load_tokenizer
from titan_data.tokenizing import messages, stream_fingerprint, tokenize_source

TRAINED = "bpe"


@dataclass(frozen=True, kw_only=True)
class TokenDataset:
    """A tokenized corpus and the tokenizer it was made with; the `TokenStream` of a `BatchLoader`."""

    store: TokenStore
    source: str
    """Where the documents came from: one line."""
    load_tokenizer: Callable[[], Tokenizer]

    @property
    def fingerprint(self) -> str:
        """Equal if and only if documents, their order and the tokenizer are; wherever the files lie."""
        return self.store.manifest.fingerprint

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens; loaded when it is first asked for."""
        return self.load_tokenizer()

    @property
    def token_count(self) -> int:
        """How many tokens, end-of-text tokens included."""
        return self.store.token_count

    @property
    def document_starts(self) -> NDArray[np.int64]:
        """Where each document begins, then N: int64 [D + 1]."""
        return self.store.document_starts

    @property
    def eos_id(self) -> int:
        """The token that ends each document."""
        return self.store.eos_id

    def copy_tokens(self, start: int, out: NDArray[np.integer]) -> None:
        """Copies the tokens from `start` on into `out`, [T]."""
        self.store.copy_tokens(start, out)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self.store.manifest.tokenizer.vocab_size

    @property
    def document_count(self) -> int:
        """How many documents, not counting empty ones."""
        return len(self.store)

    def describe(self) -> str:
        """Returns a small tree of where the tokens come from."""
        manifest, tokenizer = self.store.manifest, self.store.manifest.tokenizer
        left_out = [
            f"{count:,} {what}"
            for count, what in (
                (manifest.empty_documents, "empty documents left out"),
                (manifest.skipped_files, "files skipped that are not UTF-8"),
            )
            if count
        ]
        documents = ", ".join([f"{self.token_count:,} tokens in {self.document_count:,} documents", *left_out])
        size = sum(shard.file.size_bytes for shard in manifest.shards)
        return (
            f"data {self.fingerprint[:12]}: {documents}\n"
            f"├── source: {self.source}\n"
            f"├── tokenizer: {tokenizer.name}: {tokenizer.vocab_size:,} tokens, end of text is {tokenizer.eos_id}, "
            f"hash {tokenizer.hash[:12]}, ran on {tokenizer.engine}\n"
            f"└── tokens: {self.store.folder} ({manifest.token_type}, {len(manifest.shards):,} shards, "
            f"{size / 1e6:,.1f} MB)"
        )


def open_dataset(
    config: DataConfig,
    *,
    source: Source | None = None,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> TokenDataset:
    """Finds a corpus's tokens in the cache, or tokenizes it first; safe to call from many processes at once.

    Args:
        config: what to read, and where to keep it.
        source: reads these documents instead of those that `config.source` names.
        tokenizer: instead of the one that `config.tokenizer` names, e.g. to validate with the one of the training set.
        progress: is called with a line of text about whatever takes time; nothing is printed by itself.

    Raises:
        NotFoundError: if the corpus or the tokenizer is not there.
        DataError: if one of them is malformed or empty, or the cache cannot be written.
    """
    progress = progress or (lambda message: None)
    cache = cache_directory(config.cache_dir)
    if source is None and is_token_folder(Path(config.source).expanduser()):
        return _open_tokens(config, tokenizer)
    source = source or open_source(config, cache=cache, progress=progress)
    chosen = tokenizer or open_tokenizer(config, source, cache=cache, progress=progress)
    store = find_or_build(
        cache / "tokens" / stream_fingerprint(source, chosen)[:32],
        open_folder=open_store,
        build=lambda folder: _tokenize(folder, source, chosen, config.tokenize_workers, progress),
        what="token cache",
        progress=progress,
        resume=True,
    )
    return TokenDataset(store=store, source=source.describe(), load_tokenizer=lambda: chosen)


def open_tokenizer(config: DataConfig, source: Source, *, cache: Path, progress: Progress) -> Tokenizer:
    """Loads the tokenizer that a configuration names, or trains it on the source.

    Raises:
        NotFoundError: if it is not there.
        DataError: if it cannot be used, or an option cannot take effect.
    """
    if config.tokenizer == TRAINED:
        return trained_bpe(source, config.vocab_size, cache / "tokenizers", progress=progress)
    if config.vocab_size != DataConfig.vocab_size:
        raise DataError(
            f"data.vocab_size is {config.vocab_size}, but only a trained BPE has a vocabulary to choose the size of. "
            f"Leave it out, or set data.tokenizer to {TRAINED!r}."
        )
    return load_tokenizer(Path(config.tokenizer))


def _tokenize(folder: Path, source: Source, tokenizer: Tokenizer, workers: int, progress: Progress) -> None:
    began = time.monotonic()
    size = source_bytes(source)
    progress(f"tokenizing {source.describe()}")
    report = messages(progress, size)
    manifest = tokenize_source(folder, source, tokenizer, workers=workers, report=report)
    seconds = time.monotonic() - began
    progress(f"tokenized {size / 1e6:,.1f} MB into {manifest.tokens:,} tokens in {seconds:.1f} s")


def _open_tokens(config: DataConfig, tokenizer: Tokenizer | None) -> TokenDataset:
    """Opens a folder that titan-tokenize wrote."""
    folder = Path(config.source).expanduser().absolute()
    for name in ("format", "text_field", "template", "vocab_size"):
        default = next(field.default for field in dataclasses.fields(DataConfig) if field.name == name)
        if getattr(config, name) != default:
            raise DataError(f"data.{name} is set, but {config.source} is tokenized already. Leave it at its default.")
    try:
        store = open_store(folder)
    except DamagedError as error:
        raise DataError(f"the tokens in {folder} are damaged ({error}). Copy or tokenize them again.") from error
    record = store.manifest.tokenizer
    if tokenizer is not None and tokenizer.hash != record.hash:
        raise DataError(
            f"{config.source} was tokenized by {record.name}, which is another tokenizer than the one it is to be read "
            "with. Tokenize it again with that one, or name its text."
        )
    if tokenizer is None and config.tokenizer != TRAINED and load_tokenizer(Path(config.tokenizer)).hash != record.hash:
        raise DataError(
            f"{config.source} was tokenized by {record.name}, which is another tokenizer than data.tokenizer "
            f"{config.tokenizer!r}. Leave data.tokenizer out: the folder has its own."
        )
    return TokenDataset(store=store, source=store.manifest.source, load_tokenizer=store.load_tokenizer)
