import dataclasses
import pickle

import numpy as np
import pytest

from titan_data.config import DataConfig
from titan_data.dataset import open_dataset
from titan_data.errors import DataError
from titan_data.loader import BatchLoader
from titan_data.mixed_dataset import open_mixture, with_tokenizer_of
from titan_data.mixture_config import MixtureConfig, MixtureSource, WeightChange


@pytest.fixture
def config(tmp_path):
    return DataConfig(vocab_size=300, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def mixture(corpus_folder, tmp_path):
    more = tmp_path / "more.jsonl"
    more.write_text('{"text": "He will not see me stopping here."}\n' * 30)
    return MixtureConfig(
        sources=(
            MixtureSource(name="poems", source=str(corpus_folder), weight=3),
            MixtureSource(name="lines", source=str(more), weight=1),
        ),
        changes=(WeightChange(step=10, weights=(1, 1)),),
        block_size=8,
    )


def opened(config, mixture, **options):
    return open_mixture(config, mixture, **({"seq_len": 16, "global_batch_size": 4, "seed": 0} | options))


def test_sources_are_mixed_as_configured(config, mixture):
    data = opened(config, mixture)
    assert data.vocab_size == 300
    loader = BatchLoader(data, global_batch_size=4, prefetch=0)
    names = [data.mixture.source_of(next(loader)["sample_ids"].numpy()) for _ in range(20)]
    assert [sum(step.count("lines") for step in names[i : i + 2]) for i in range(0, 20, 2)] == [2] * 5 + [4] * 5
    n = {name: -(-(dataset.token_count - 1) // 16) for name, dataset in data.datasets.items()}
    assert loader.epochs == {"poems": 50 / n["poems"], "lines": 30 / n["lines"]}
    assert loader.epoch == 80 / sum(n.values())
    assert data.describe().startswith("mixture in blocks of 8 samples\npoems: 75.0% of the samples")


def test_all_sources_have_the_tokenizer_of_the_first(config, mixture):
    data = opened(config, mixture)
    poems, lines = data.datasets.values()
    assert poems.tokenizer.hash == lines.tokenizer.hash == data.tokenizer.hash
    assert lines.tokenizer.decode(lines.store[0][:-1].tolist()) == "He will not see me stopping here."


def test_folders_of_tokens_may_be_mixed_in_if_their_tokenizer_is_the_same(config, mixture):
    folders = [str(dataset.store.folder) for dataset in opened(config, mixture).datasets.values()]
    sources = [dataclasses.replace(s, source=f) for s, f in zip(mixture.sources, folders, strict=True)]
    base = DataConfig(cache_dir=config.cache_dir)
    again = opened(base, dataclasses.replace(mixture, sources=tuple(sources)))
    assert again.fingerprint == opened(config, mixture).fingerprint
    other = open_dataset(dataclasses.replace(config, source=mixture.sources[1].source, vocab_size=270))
    sources[1] = dataclasses.replace(sources[1], source=str(other.store.folder))
    with pytest.raises(DataError, match="which is another tokenizer"):
        opened(base, dataclasses.replace(mixture, sources=tuple(sources)))


def test_a_config_with_the_tokenizer_of_a_dataset(config, corpus_folder, mixture):
    data = open_dataset(dataclasses.replace(config, source=str(corpus_folder)))
    other = open_dataset(with_tokenizer_of(data, dataclasses.replace(config, source=mixture.sources[1].source)))
    assert other.tokenizer.hash == data.tokenizer.hash


def test_a_worker_reads_the_same(config, mixture):
    data = opened(config, mixture)
    sent = pickle.loads(pickle.dumps(data))
    samples = np.arange(30)
    for name, array in data.read(samples).items():
        np.testing.assert_array_equal(sent.read(samples)[name], array)


def test_refuses_names_and_weights_that_do_not_fit(config, mixture):
    with pytest.raises(DataError, match=r"these are named \['poems', 'poems'\]"):
        opened(config, dataclasses.replace(mixture, sources=(mixture.sources[0],) * 2))
    with pytest.raises(DataError, match=r"these are named \[\]"):
        opened(config, dataclasses.replace(mixture, sources=()))
    with pytest.raises(DataError, match="at step 5 has 1 weights for 2 sources"):
        opened(config, dataclasses.replace(mixture, changes=(WeightChange(step=5, weights=(1,)),)))
