"""Tokenized conversations on disk, mapped into memory.

ids.npy       the tokens of all conversations in a row: uint32 [tokens]
learned.npy   whether each carries loss: bool [tokens]
starts.npy    where each conversation begins, then the number of tokens: int64 [conversations + 1]
"""

import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from titan_data.cache import DamagedError, Progress
from titan_data.chat import ChatTokenizer
from titan_data.conversations import Conversation
from titan_data.errors import DataError

_AT_A_TIME = 256
_BETWEEN_MESSAGES = 20_000


@dataclass(frozen=True)
class ConversationStore:
    """The tokens of conversations, one after the other."""

    ids: NDArray[np.uint32]
    """[tokens]"""
    learned: NDArray[np.bool_]
    """Whether each carries loss: [tokens]."""
    starts: NDArray[np.int64]
    """Where each conversation begins, then the number of tokens: [conversations + 1]."""
    folder: Path | None = None

    def __reduce__(self) -> tuple:
        if self.folder is not None:
            return open_conversation_store, (self.folder,)
        return ConversationStore, (self.ids, self.learned, self.starts)

    def __len__(self) -> int:
        return len(self.starts) - 1


def open_conversation_store(folder: Path) -> ConversationStore:
    """Maps a folder that `store_conversations` wrote.

    Raises:
        FileNotFoundError: if it is not there.
        DamagedError: if a file in it is not as long as it was written.
    """
    try:
        ids, learned, starts = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "learned", "starts"))
    except ValueError as error:
        raise DamagedError(error) from error
    if not len(ids) == len(learned) == starts[-1]:
        raise DamagedError("the files do not belong together")
    return ConversationStore(np.asarray(ids), np.asarray(learned), np.asarray(starts), folder)


def store_conversations(
    folder: Path, conversations: Iterable[Conversation], chat: ChatTokenizer, *, source: str, progress: Progress
) -> None:
    """Tokenizes conversations into a folder.

    Args:
        folder: where the files go.
        conversations: in order.
        chat: makes the tokens.
        source: where the conversations come from, for messages.
        progress: is told how far it is.

    Raises:
        DataError: for a malformed conversation, naming its place, or if there are none.
    """
    starts, reported = [0], 0
    iterator = iter(conversations)
    raw = [folder / "ids.partial", folder / "learned.partial"]
    with raw[0].open("wb") as ids, raw[1].open("wb") as learned:
        while batch := list(itertools.islice(iterator, _AT_A_TIME)):
            for found in chat.encode(batch):
                ids.write(found.ids.tobytes())
                learned.write(found.learned.tobytes())
                starts.append(starts[-1] + len(found.ids))
            if len(starts) - reported > _BETWEEN_MESSAGES:
                reported = len(starts)
                progress(f"tokenizing: {len(starts) - 1:,} conversations, {starts[-1]:,} tokens")
    if len(starts) == 1:
        raise DataError(f"there are no conversations in {source}. Name files with some.")
    save_array(folder / "starts.npy", np.array(starts, dtype=np.int64))
    for path, dtype in zip(raw, (np.uint32, np.bool_), strict=True):
        save_array(path.with_suffix(".npy"), np.memmap(path, dtype=dtype, mode="r"))
        path.unlink()


def save_array(path: Path, array: NDArray) -> None:
    """Writes an array as .npy, and waits until it is on the disk."""
    with path.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
