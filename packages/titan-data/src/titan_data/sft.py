"""Conversations as rows to train on: found in the cache, or tokenized and packed once.

source (content fingerprint) -> chat template and tokenizer -> conversation store -> packs -> rows
"""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from titan_data.cache import DamagedError, Progress, cache_directory, find_or_build
from titan_data.chat import ChatTokenizer
from titan_data.chat_bpe import trained_chat_bpe
from titan_data.chat_template import open_template
from titan_data.config import DataConfig
from titan_data.conversation_store import (
    ConversationStore,
    open_conversation_store,
    save_array,
    store_conversations,
)
from titan_data.conversations import read_conversations
from titan_data.dataset import TRAINED, open_tokenizer
from titan_data.errors import DataError, about
from titan_data.packing import PackedConversations, Packs, plan_packs
from titan_data.rows import RowArrays
from titan_data.sft_config import SFTConfig
from titan_data.source import Source
from titan_data.sources import open_source
from titan_data.tokenizer import Tokenizer


@dataclass(frozen=True)
class SFTDataset:
    """Packed conversations and how they were made; `Rows`."""

    rows: PackedConversations
    chat: ChatTokenizer
    source: str
    """Where the conversations came from: one line."""
    fingerprint: str
    """Equal if and only if conversations, tokens, template and policy are; wherever the files lie."""

    @property
    def seq_len(self) -> int:
        """Tokens in a row."""
        return self.rows.seq_len

    @property
    def tokens_per_row(self) -> float:
        """How many places of a row are taken, on average."""
        return self.rows.tokens_per_row

    @property
    def documents_per_row(self) -> float:
        """How many conversations a row holds, on average."""
        return self.rows.documents_per_row

    @property
    def tokenizer(self) -> Tokenizer:
        """What made the tokens."""
        return self.chat.tokenizer

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self.chat.tokenizer.vocab_size

    def __reduce__(self) -> tuple:
        # A process that only reads rows needs no template, and Jinja's cannot be sent.
        return _rows, (self.rows,)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: NDArray[np.int64]) -> RowArrays:
        """Returns these rows."""
        return self.rows.read(rows)

    def describe(self) -> str:
        """Returns a small tree of what the rows hold."""
        store, packs = self.rows.store, self.rows.packs
        return (
            f"conversations {self.fingerprint[:12]}: {len(store):,} with {len(store.ids):,} tokens, of which "
            f"{int(np.count_nonzero(store.learned)):,} carry loss\n"
            f"├── source: {self.source}\n"
            f"├── tokenizer: {self.tokenizer.describe()}\n"
            f"├── template: {self.chat.template.name}\n"
            f"└── rows: {len(self):,} of {self.seq_len:,} tokens, {self.tokens_per_row / self.seq_len:.1%} full; "
            f"{packs.truncated:,} conversations truncated, {packs.dropped:,} left out for being too long"
        )


def open_sft(
    config: DataConfig,
    sft: SFTConfig,
    *,
    seq_len: int,
    source: Source | None = None,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> SFTDataset:
    """Finds conversations in the cache, or tokenizes and packs them first; safe to call from many processes at once.

    Args:
        config: what to read, and where to keep it.
        sft: how it becomes rows.
        seq_len: tokens in a row.
        source: reads these records instead of those that `config.source` names.
        tokenizer: instead of the one that `config.tokenizer` names, e.g. to validate with the one of the training set.
        progress: is called with a line of text about whatever takes time.

    Raises:
        NotFoundError: if conversations, tokenizer or template are not there.
        DataError: if one of them is malformed, an option cannot take effect, or no conversation fits into a row.
    """
    progress = progress or (lambda message: None)
    _check(config, sft, seq_len)
    cache = cache_directory(config.cache_dir)
    if source is None:
        source = open_source(config, cache=cache, progress=progress)
    if tokenizer is None and config.tokenizer == TRAINED:
        tokenizer = trained_chat_bpe(source, config.vocab_size, sft.template, cache / "tokenizers", progress=progress)
    tokenizer = tokenizer or open_tokenizer(config, source, cache=cache, progress=progress)
    with about("sft.template"):
        template = open_template(sft, tokenizer)
    chat = ChatTokenizer(tokenizer, template)
    identity = hashlib.sha256(f"titan-data chat 1, {source.fingerprint}, {chat.identity}".encode()).hexdigest()
    store = find_or_build(
        cache / "conversations" / identity[:32],
        open_folder=open_conversation_store,
        build=lambda folder: store_conversations(
            folder, read_conversations(source), chat, source=source.describe(), progress=progress
        ),
        what="conversations",
        progress=progress,
    )
    plan = f"{identity}, {sft.too_long}, {sft.pack}"
    packs = find_or_build(
        cache / "packs" / hashlib.sha256(f"{plan}, {seq_len}".encode()).hexdigest()[:32],
        open_folder=functools.partial(_open_packs, store=store),
        build=lambda folder: _store_packs(
            folder, plan_packs(store, seq_len=seq_len, too_long=sft.too_long, pack=sft.pack)
        ),
        what="packs",
        progress=progress,
    )
    if not len(packs.conversations):
        raise DataError(
            f"none of the {len(store):,} conversations of {source.describe()} fits into a row of {seq_len} tokens. "
            "Choose longer rows, or set data.sft.too_long to 'truncate'."
        )
    if 2 * packs.dropped > len(store):
        progress(
            f"warning: {packs.dropped:,} of the {len(store):,} conversations of {source.describe()} are left out: they "
            f"do not fit into a row of {seq_len} tokens. Choose longer rows, or set data.sft.too_long to 'truncate'."
        )
    pad = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
    rows = PackedConversations(store, packs, seq_len, pad)
    return SFTDataset(rows, chat, source.describe(), hashlib.sha256(plan.encode()).hexdigest())


def _check(config: DataConfig, sft: SFTConfig, seq_len: int) -> None:
    if seq_len < 1:
        raise DataError(f"seq_len is {seq_len}; a row needs at least 1 token.")
    if problems := sft.problems():
        raise DataError(" ".join(problems))
    for name in ("text_field", "template"):
        if getattr(config, name) != getattr(DataConfig, name):
            raise DataError(f"data.{name} is set, but conversations are recognised by their fields. Leave it out.")
    if not config.confine_attention:
        raise DataError("data.confine_attention is off, but conversations in a row must not see each other.")


def _store_packs(folder: Path, packs: Packs) -> None:
    save_array(folder / "conversations.npy", packs.conversations)
    save_array(folder / "starts.npy", packs.starts)
    save_array(folder / "counts.npy", np.array([packs.truncated, packs.dropped]))


def _open_packs(folder: Path, *, store: ConversationStore) -> Packs:
    try:
        conversations, starts, counts = (
            np.load(folder / f"{name}.npy") for name in ("conversations", "starts", "counts")
        )
    except ValueError as error:
        raise DamagedError(error) from error
    if starts[-1] != len(conversations) or len(conversations) + counts[1] != len(store):
        raise DamagedError("the plan does not belong to the conversations")
    return Packs(conversations, starts, int(counts[0]), int(counts[1]))


def _rows(rows: PackedConversations) -> PackedConversations:
    return rows
