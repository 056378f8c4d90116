"""What a run reads, of any kind that titan-data knows: opened, put in order and read ahead."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

from titan_data.chat_template import TEMPLATE_FILE
from titan_data.config import DataConfig
from titan_data.dataset import TokenDataset, open_dataset
from titan_data.errors import about
from titan_data.loader import BatchLoader
from titan_data.mixed_dataset import MixedDataset, open_mixture
from titan_data.rows import Rows
from titan_data.sft import SFTDataset, open_sft
from titan_data.stream_dataset import StreamDataset, open_streams
from titan_data.stream_loader import StreamLoader
from titan_data.validation import ValidationSet
from titan_data.windows import TokenWindows
from titan_train.config import TrainConfig

Dataset: TypeAlias = TokenDataset | MixedDataset | SFTDataset | StreamDataset
"""All say `fingerprint`, `tokenizer`, `vocab_size` and `describe()`."""

Loader: TypeAlias = BatchLoader | StreamLoader
"""An iterator over this rank's rows of the global batches, whose state is a part of checkpoints."""

Progress: TypeAlias = Callable[[str], None]


def open_data(config: TrainConfig, *, progress: Progress) -> Dataset:
    """Finds the data of a run, tokenizing it first if need be; `progress` is told what takes time.

    Raises:
        DataError: if it is not there or of no use.
    """
    data, training = config.data, config.training
    match data.kind:
        case "mixture":
            return open_mixture(
                data,
                data.mixture,
                seq_len=training.seq_len,
                global_batch_size=training.global_batch_size,
                seed=training.seed,
                progress=progress,
            )
        case "sft":
            return open_sft(data, data.sft, seq_len=training.seq_len, progress=progress)
        case "stream":
            return open_streams(data, data.stream, seq_len=training.seq_len, seed=training.seed, progress=progress)
        case "text":
            return open_dataset(data, progress=progress)


def build_loader(config: TrainConfig, dataset: Dataset, *, rank: int, rows: int, on_gpu: bool) -> Loader:
    """What reads the rows of data-parallel rank `rank`, `rows` of each global batch."""
    data, training, loader = config.data, config.training, config.data.loader
    pin_memory = on_gpu if loader.pin_memory is None else loader.pin_memory
    ahead = {"prefetch": loader.prefetch, "workers": loader.workers, "timeout_seconds": loader.timeout_seconds}
    share = {"global_batch_size": training.global_batch_size, "rank": rank, "rows": rows, "pin_memory": pin_memory}
    order = {"seed": training.seed, "shuffle": data.shuffle}
    match dataset:
        case StreamDataset():
            return StreamLoader(dataset.rows, **share, **ahead)
        case MixedDataset():
            return BatchLoader(dataset, **share, **ahead)
        case SFTDataset():
            return BatchLoader(dataset, **order, **share, **ahead)
        case TokenDataset():
            windows = TokenWindows(dataset, seq_len=training.seq_len, confine_attention=data.confine_attention)
            return BatchLoader(windows, **order, **share, **ahead)


def open_validation(config: TrainConfig, dataset: Dataset, *, progress: Progress) -> list[ValidationSet]:
    """The sets to validate on, read and tokenized as the `dataset` that is trained on.

    Raises:
        DataError: if one of them is not there or of no use.
    """
    sets = []
    for name, source in config.validation.sets.items():
        with about(f"validation.sets {name}"):
            rows = _validation_rows(config, source, dataset, progress)
            sets.append(ValidationSet(name, rows, dataset.tokenizer, max_rows=config.validation.max_rows))
    return sets


def _validation_rows(config: TrainConfig, source: str, dataset: Dataset, progress: Progress) -> Rows:
    tokenizer, seq_len = dataset.tokenizer, config.training.seq_len
    own = dataclasses.replace(
        config.data, source=source, tokenizer=DataConfig.tokenizer, vocab_size=DataConfig.vocab_size
    )
    if config.data.kind == "sft":
        return open_sft(own, config.data.sft, seq_len=seq_len, tokenizer=tokenizer, progress=progress)
    found = open_dataset(own, tokenizer=tokenizer, progress=progress)
    return TokenWindows(found, seq_len=seq_len, confine_attention=own.confine_attention)


def epochs_by_source(loader: Loader) -> Mapping[str, float]:
    """How often each source has been read, if there are several."""
    epochs = loader.epochs if isinstance(loader, BatchLoader) else {}
    return epochs if len(epochs) > 1 else {}


def tokenizer_files(dataset: Dataset) -> dict[str, bytes]:
    """What others need to write and read the run's tokens: the tokenizer's files and, of a chat, its template."""
    files = dict(dataset.tokenizer.files)
    if isinstance(dataset, SFTDataset):
        files[TEMPLATE_FILE] = dataset.chat.template.text.encode()
    return files
