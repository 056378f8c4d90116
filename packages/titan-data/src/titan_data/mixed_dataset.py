"""A mixture of corpora as a configuration names them: found in the cache, or tokenized once, all by one tokenizer."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from titan_data.cache import Progress
from titan_data.config import DataConfig
from titan_data.dataset import TokenDataset, open_dataset
from titan_data.errors import DataError
from titan_data.manifest import TOKENIZER
from titan_data.mixture import Mixture
from titan_data.mixture_config import MixtureConfig
from titan_data.rows import RowArrays
from titan_data.tokenizer import Tokenizer
from titan_data.windows import TokenWindows


@dataclass(frozen=True)
class MixedDataset:
    """Several tokenized corpora and their mixture; `Samples`."""

    mixture: Mixture
    datasets: Mapping[str, TokenDataset]

    @property
    def fingerprint(self) -> str:
        """Equal if and only if the names and contents of all sources, their order and the tokenizer are."""
        identity = [[name, dataset.fingerprint] for name, dataset in self.datasets.items()]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    @property
    def tokenizer(self) -> Tokenizer:
        """What made the tokens of all sources."""
        return next(iter(self.datasets.values())).tokenizer

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return next(iter(self.datasets.values())).vocab_size

    @property
    def row_count(self) -> int:
        """How many windows the sources have together."""
        return self.mixture.row_count

    def __reduce__(self) -> tuple:
        # A process that only reads rows needs no tokenizer.
        return _mixture, (self.mixture,)

    def read(self, samples: NDArray[np.int64]) -> RowArrays:
        """Returns the rows at these places of the mixture."""
        return self.mixture.read(samples)

    def epochs(self, samples: int) -> Mapping[str, float]:
        """Returns how often each source has been read when so many samples are done."""
        return self.mixture.epochs(samples)

    def describe(self) -> str:
        """Returns the mixture and a small tree for each of its sources."""
        trees = (f"{name}: {dataset.describe()}" for name, dataset in self.datasets.items())
        return "\n".join([self.mixture.describe(), *trees])


def open_mixture(
    config: DataConfig,
    mixture: MixtureConfig,
    *,
    seq_len: int,
    global_batch_size: int,
    seed: int,
    progress: Progress | None = None,
) -> MixedDataset:
    """Opens the sources of a mixture; safe to call from many processes at once.

    Args:
        config: how to read and tokenize them. A tokenizer that is trained is trained on the first source.
        mixture: which sources, and their shares.
        seq_len: tokens in a row.
        global_batch_size: samples of a step; turns the steps at which weights change into samples.
        seed: fixes the order.
        progress: is called with a line of text about whatever takes time.

    Raises:
        NotFoundError: if a source or the tokenizer is not there.
        DataError: if one of them cannot be used, two have one name or other tokenizers, or weights mean nothing.
    """
    names = [source.name for source in mixture.sources]
    if not names or len(set(names)) < len(names):
        raise DataError(f"a mixture has one or more sources, each with a name of its own; these are named {names}.")
    for change in mixture.changes:
        if len(change.weights) != len(names):
            raise DataError(
                f"the change of weights at step {change.step} has {len(change.weights)} weights for {len(names)} "
                "sources."
            )
    datasets: dict[str, TokenDataset] = {}
    for source in mixture.sources:
        own = dataclasses.replace(config, source=source.source)
        if datasets:
            own = with_tokenizer_of(next(iter(datasets.values())), own)
        datasets[source.name] = open_dataset(own, progress=progress)
    mixed = Mixture(
        {
            name: TokenWindows(dataset.store, seq_len=seq_len, confine_attention=config.confine_attention)
            for name, dataset in datasets.items()
        },
        {source.name: source.weight for source in mixture.sources},
        seed=seed,
        shuffle=config.shuffle,
        weigh_by=mixture.weigh_by,
        block_size=mixture.block_size,
        changes={
            change.step * global_batch_size: dict(zip(names, change.weights, strict=True)) for change in mixture.changes
        },
    )
    return MixedDataset(mixed, datasets)


def with_tokenizer_of(dataset: TokenDataset, config: DataConfig) -> DataConfig:
    """Returns a configuration that tokenizes as a dataset was: to validate on other text, or to mix it in."""
    folder = dataset.store.folder / TOKENIZER
    return dataclasses.replace(config, tokenizer=str(folder), vocab_size=DataConfig.vocab_size)


def _mixture(mixture: Mixture) -> Mixture:
    return mixture
