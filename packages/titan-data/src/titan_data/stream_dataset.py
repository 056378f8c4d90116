"""A corpus as virtual streams, as a configuration names it: tokenized while it is read, with nothing kept."""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from titan_data.cache import Progress, cache_directory
from titan_data.config import DataConfig
from titan_data.dataset import TRAINED, open_tokenizer
from titan_data.errors import DataError, import_extra
from titan_data.hugging_face_datasets import PREFIX
from titan_data.records import TextOf, text_of
from titan_data.source import Record, all_pieces
from titan_data.sources import open_source
from titan_data.stream_config import StreamConfig
from titan_data.stream_rows import StreamRows
from titan_data.streams import IterableStreams, SourceStreams
from titan_data.tokenizer import Tokenizer
from titan_data.tokenizer_files import load_tokenizer
from titan_data.tokenizing import stream_fingerprint


@dataclass(frozen=True)
class StreamDataset:
    """What a `StreamLoader` reads, and where it comes from."""

    rows: StreamRows
    source: str
    """Where the documents come from: one line."""
    fingerprint: str
    """Made of the documents and the tokenizer; of a dataset that streams from the hub, of its name instead."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What makes the tokens."""
        return self.rows.tokenizer

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self.rows.tokenizer.vocab_size

    def describe(self) -> str:
        """Returns a small tree of where the tokens come from."""
        return (
            f"data {self.fingerprint[:12]}: tokenized on the fly, in {self.rows.streams:,} streams\n"
            f"├── source: {self.source}\n"
            f"└── tokenizer: {self.tokenizer.describe()}"
        )


def open_streams(
    config: DataConfig, stream: StreamConfig, *, seq_len: int, seed: int, progress: Progress | None = None
) -> StreamDataset:
    """Opens a corpus to be tokenized on the fly; a dataset of the hub ("hf:...") is streamed, and not downloaded first.

    Args:
        config: what to read, and the tokenizer.
        stream: how it is dealt out.
        seq_len: tokens in a row.
        seed: fixes the order.
        progress: is called with a line of text about whatever takes time.

    Raises:
        NotFoundError: if the corpus or the tokenizer is not there.
        DataError: if one of them cannot be used, or an option cannot take effect.
    """
    if problems := stream.problems():
        raise DataError(" ".join(problems))
    if seq_len < 1:
        raise DataError(f"seq_len is {seq_len}; a row needs at least 1 token.")
    progress = progress or (lambda message: None)
    cache = cache_directory(config.cache_dir)
    if config.source.startswith(PREFIX):
        if config.tokenizer == TRAINED:
            raise DataError(
                f"{config.source} is streamed, so that no tokenizer can be trained on it beforehand. Name one with "
                "data.tokenizer."
            )
        texts = HubTexts(config.source, text_of(config.text_field, config.template))
        if not any(texts(0)):
            raise DataError(f"the corpus is empty: {config.source} has no text. Name one that has some.")
        tokenizer = load_tokenizer(Path(config.tokenizer))
        rows = StreamRows(IterableStreams(texts), tokenizer, stream.streams, seq_len, config.confine_attention)
        identity = f"titan-data hub stream 1, {config.source}, {texts.text.identity}, tokenizer {tokenizer.hash}"
        return StreamDataset(rows, config.source, hashlib.sha256(identity.encode()).hexdigest())
    source = open_source(config, cache=cache, progress=progress)
    if not any(piece.text for piece in all_pieces(source)):
        raise DataError(f"the corpus is empty: {source.describe()}, with no text in it. Name one that has some.")
    tokenizer = open_tokenizer(config, source, cache=cache, progress=progress)
    streams = SourceStreams(source, seed, config.shuffle)
    rows = StreamRows(streams, tokenizer, stream.streams, seq_len, config.confine_attention)
    return StreamDataset(rows, source.describe(), stream_fingerprint(source, tokenizer))


@dataclass(frozen=True)
class HubTexts:
    """The texts of a dataset of the Hugging Face hub, in its order, fetched while they are read."""

    source: str
    """As in `DataConfig.source`: "hf:OWNER/NAME[:CONFIG[:SPLIT]]"."""
    text: TextOf

    def __call__(self, epoch: int) -> Iterator[str]:
        """Begins an epoch.

        Raises:
            DataError: if the dataset cannot be had, or a row has no text where it should.
        """
        repo, config, split = _parse(self.source)
        datasets = import_extra("datasets", extra="hf", purpose="streaming datasets of the Hugging Face hub")
        try:
            rows = iter(datasets.load_dataset(repo, config, split=split, streaming=True))
        except Exception as error:  # the library and its network clients have no common class of errors
            raise DataError(
                f"cannot stream the source {self.source!r}: {type(error).__name__}: {error}. Check the name, the "
                "config, the split and the network; a private or gated dataset takes HF_TOKEN."
            ) from error
        for number in itertools.count():
            place = f"{self.source}, row {number}"
            try:
                row = next(rows, None)
            except Exception as error:
                raise DataError(f"{place}: cannot be read ({type(error).__name__}: {error}).") from error
            if row is None:
                return
            yield self.text(Record(row, place.__str__))


def _parse(source: str) -> tuple[str, str | None, str]:
    """Owner and name, config and split of a dataset of the hub."""
    repo, _, rest = source.removeprefix(PREFIX).partition(":")
    config, _, split = rest.partition(":")
    if not repo or ":" in split:
        raise DataError(
            f"the source {source!r} is not of the form hf:OWNER/NAME, hf:OWNER/NAME:CONFIG or :CONFIG:SPLIT."
        )
    return repo, config or None, split or "train"
