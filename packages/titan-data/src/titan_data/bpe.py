"""Training a small byte-level BPE on a corpus, so that a run needs nothing but text.

The same corpus and size give the same tokenizer, bit for bit, in any process and with any number of threads.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from titan_data.cache import DamagedError, Progress, find_or_build
from titan_data.errors import DataError
from titan_data.hugging_face_tokenizer import HuggingFaceTokenizer
from titan_data.source import Source, all_pieces, source_bytes
from titan_data.threads import library_threads
from titan_data.tokenizer import TOKENIZER_FILE

# Text enough for tens of thousands of entries, and a few seconds of training.
SAMPLE_BYTES = 32_000_000

_BOS, _EOS, _PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
_BYTES = 256
_CONFIG_FILE = "tokenizer_config.json"


def trained_bpe(corpus: Source, vocab_size: int, folder: Path, *, progress: Progress) -> HuggingFaceTokenizer:
    """Returns the tokenizer of `vocab_size` entries for a corpus, training it once.

    Args:
        corpus: the text; at most about `SAMPLE_BYTES` of it are used, evenly spread over it.
        vocab_size: entries, with 256 bytes and 3 special tokens among them; a small corpus may yield fewer.
        folder: where trained tokenizers are kept.
        progress: is told when one is trained.

    Raises:
        DataError: if `vocab_size` is too small, or the corpus is malformed.
    """
    least = _BYTES + len((_BOS, _EOS, _PAD))
    if vocab_size < least:
        raise DataError(
            f"data.vocab_size is {vocab_size}; a byte-level vocabulary has at least {least} entries (256 bytes and "
            "3 special tokens)."
        )
    key = hashlib.sha256(f"bpe 1, {SAMPLE_BYTES}, {vocab_size}, {corpus.fingerprint}".encode()).hexdigest()[:32]
    return find_or_build(
        folder / key,
        open_folder=_open,
        build=lambda scratch: _train(scratch, corpus, vocab_size, progress),
        what="tokenizer",
        progress=progress,
    )


def _train(folder: Path, corpus: Source, vocab_size: int, progress: Progress) -> None:
    progress(f"training a byte-level BPE of {vocab_size:,} entries on {corpus.describe()}")
    for name, content in train_bpe(_sample(corpus), vocab_size).items():
        with (folder / name).open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict[str, bytes]:
    """Returns the files of a byte-level BPE trained on these texts, in the format of Hugging Face."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    # The split pattern is GPT-2's; add_prefix_space would change texts that do not begin with a space.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[_BOS, _EOS, _PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    with library_threads():
        tokenizer.train_from_iterator(texts, trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _BOS,
        "eos_token": _EOS,
        "pad_token": _PAD,
    }
    return {TOKENIZER_FILE: tokenizer.to_str().encode(), _CONFIG_FILE: json.dumps(config, indent=2).encode()}


def _sample(corpus: Source) -> Iterator[str]:
    """Every k-th piece, with the k that leaves about `SAMPLE_BYTES`; never much more, however uneven the pieces."""
    stride = max(1, -(-source_bytes(corpus) // SAMPLE_BYTES))
    left = SAMPLE_BYTES
    for piece in itertools.islice(all_pieces(corpus), 0, None, stride):
        if left <= 0:
            return
        left -= len(piece.text)
        yield piece.text


def _open(folder: Path) -> HuggingFaceTokenizer:
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        files = {name: (folder / name).read_bytes() for name in (TOKENIZER_FILE, _CONFIG_FILE)}
        return HuggingFaceTokenizer(files, name="byte-level BPE trained on the corpus")
    except (FileNotFoundError, DataError) as error:
        raise DamagedError(error) from error
