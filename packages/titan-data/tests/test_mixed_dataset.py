import dataclasses
import pickle

import numpy as np
import pytest

from titan_data.config import DataConfig
from titan_data.dataset import open_dataset
from titan_data.errors import DataError
from titan_data.loader import BatchLoader
from titan_data.mixed_dataset import open_mixture
from titan_data.mixture_config import MixtureConfig, WeightChange


@pytest.fixture
def config(tmp_path):
    return DataConfig(vocab_size=300, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def mixture(corpus_folder, tmp_path):
    more = tmp_path / "more.jsonl"
    more.write_text('{"text": "He will not see me stopping here."}\n' * 30)
    return MixtureConfig(
        sources={"poems": str(corpus_folder), "lines": str(more)},
        weights={"poems": 3, "lines": 1},
        changes=(WeightChange(step=10, weights={"poems": 1, "lines": 1}),),
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
    folders = {name: str(dataset.store.folder) for name, dataset in opened(config, mixture).datasets.items()}
    base = DataConfig(cache_dir=config.cache_dir)
    again = opened(base, dataclasses.replace(mixture, sources=folders))
    assert again.fingerprint == opened(config, mixture).fingerprint
    other = open_dataset(dataclasses.replace(config, source=mixture.sources["lines"], vocab_size=270))
    with pytest.raises(DataError, match="which is another tokenizer"):
        opened(base, dataclasses.replace(mixture, sources=folders | {"lines": str(other.store.folder)}))


def test_without_weights_all_sources_have_the_same(config, mixture):
    even = opened(config, dataclasses.replace(mixture, weights={}, changes=()))
    assert even.describe().startswith("mixture in blocks of 8 samples\npoems: 50.0% of the samples")


def test_a_source_that_cannot_be_read_is_named(config, mixture, tmp_path):
    (tmp_path / "broken.jsonl").write_text("no JSON")
    for place, message in (("nowhere", "there is no corpus"), ("broken.jsonl", "broken.jsonl, line 1: not JSON")):
        sources = mixture.sources | {"lines": str(tmp_path / place)}
        with pytest.raises(DataError, match=rf"^data\.mixture\.sources lines: .*{message}"):
            opened(config, dataclasses.replace(mixture, sources=sources))


def test_a_worker_reads_the_same(config, mixture):
    data = opened(config, mixture)
    sent = pickle.loads(pickle.dumps(data))
    samples = np.arange(30)
    for name, array in data.read(samples).items():
        np.testing.assert_array_equal(sent.read(samples)[name], array)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": {}}, "names no source"),
        ({"weights": {"poems": 1}}, r"data\.mixture\.weights names poems, but the sources are poems, lines"),
        ({"changes": (WeightChange(step=5, weights={}),)}, "the change of weights at step 5 names nothing"),
    ],
)
def test_refuses_names_that_do_not_fit(config, mixture, changes, message):
    with pytest.raises(DataError, match=message):
        opened(config, dataclasses.replace(mixture, **changes))
