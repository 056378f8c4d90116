"""Small corpora on disk, and token streams in memory."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("titan-data", deadline=None, database=None, max_examples=60)
settings.load_profile("titan-data")

POEM = (
    "Whose woods these are I think I know.\nHis house is in the village though;\n",
    "He will not see me stopping here\nTo watch his woods fill up with snow.\n",
    "Größe, naïve, 東京, emoji 🙂 and\ttabs\r\nall of it UTF-8.\n",
)


def stream_of(lengths, eos_id=0):
    """Documents of these lengths, eos included; every token of the stream differs from its neighbours."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(1, starts[-1] + 1).astype(np.uint32)
    return SimpleNamespace(tokens=tokens, document_starts=starts, eos_id=eos_id)


@pytest.fixture(scope="session")
def make_stream():
    return stream_of


@pytest.fixture
def corpus_folder(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, text in enumerate(POEM):
        (folder / f"{number}.txt").write_bytes(text.encode() * 5)
    return folder


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory) -> Path:
    """A tokenizer as users have it: a folder with a tokenizer.json."""
    from titan_data.bpe import train_bpe

    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in train_bpe(POEM * 20, 310).items():
        (folder / name).write_bytes(content)
    return folder
