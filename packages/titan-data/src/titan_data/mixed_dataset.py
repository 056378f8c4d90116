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
from titan_data.errors import DataError, about
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
    if problems := mixture.problems():
        raise DataError(" ".join(problems))
    datasets: dict[str, TokenDataset] = {}
    for name, source in mixture.sources.items():
        tokenizer = next(iter(datasets.values())).tokenizer if datasets else None
        own = dataclasses.replace(config, source=source)
        with about(f"data.mixture.sources {name}"):
            datasets[name] = open_dataset(own, tokenizer=tokenizer, progress=progress)
    mixed = Mixture(
        {
            name: TokenWindows(dataset.store, seq_len=seq_len, confine_attention=config.confine_attention)
            for name, dataset in datasets.items()
        },
        mixture.weights or dict.fromkeys(mixture.sources, 1.0),
        seed=seed,
        shuffle=config.shuffle,
        weigh_by=mixture.weigh_by,
        block_size=mixture.block_size,
        changes={change.step * global_batch_size: change.weights for change in mixture.changes},
    )
    return MixedDataset(mixed, datasets)


def _mixture(mixture: Mixture) -> Mixture:
    return mixture
