"""The order law: what a step reads depends on the data and the seed alone, for every kind of dataset."""

import pytest
import torch

from titan_data.config import DataConfig
from titan_data.dataset import open_dataset
from titan_data.loader import BatchLoader
from titan_data.mixture import Mixture
from titan_data.sft import open_sft
from titan_data.sft_config import SFTConfig
from titan_data.windows import TokenWindows

B, STEPS = 8, 200


@pytest.fixture(scope="module")
def datasets(bpe_folder, tmp_path_factory):
    """Each kind, as the arguments of a loader."""
    folder = tmp_path_factory.mktemp("law")
    (folder / "text").mkdir()
    for number in range(20):
        (folder / "text" / f"{number}.txt").write_text(f"Whose woods these are I think I know, {number}.\n" * number)
    config = DataConfig(source=str(folder / "text"), tokenizer=str(bpe_folder), cache_dir=str(folder / "cache"))
    text = open_dataset(config)
    chat = open_sft(
        DataConfig(source="conversations", vocab_size=400, cache_dir=str(folder / "cache")),
        SFTConfig(template="llama3"),
        seq_len=512,
    )
    rows = {"a": TokenWindows(text, seq_len=32), "b": TokenWindows(text, seq_len=32, confine_attention=False)}
    mixture = Mixture(rows, {"a": 2, "b": 1}, seed=1, block_size=50, changes={77: {"a": 1, "b": 1}})
    return {
        "tokens": {"dataset": text, "seq_len": 32, "seed": 1},
        "mixture": {"dataset": mixture},
        "conversations": {"dataset": chat, "seed": 1},
    }


def steps(options, ranks, first, count, **more):
    """The global batches of some steps, put together from all ranks."""
    loaders = [
        BatchLoader(**options, global_batch_size=B, rank=rank, rows=B // ranks, **({"prefetch": 0} | more))
        for rank in range(ranks)
    ]
    for loader in loaders:
        loader.load_state_dict({"next_batch": first})
    found = []
    for _ in range(count):
        parts = [next(loader) for loader in loaders]
        found.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    assert {loader.state_dict()["next_batch"] for loader in loaders} == {first + count}
    for loader in loaders:
        loader.close()
    return found


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[name], other[name]) for name in batch)


KINDS = ["tokens", "mixture", "conversations"]


@pytest.mark.parametrize("kind", KINDS)
def test_on_any_number_of_ranks_and_after_changes_of_it(datasets, kind):
    expected = steps(datasets[kind], 1, 0, STEPS)
    assert len({tuple(batch["sample_ids"].tolist()) for batch in expected}) > STEPS * 0.9
    for ranks in (2, 4, 8):
        assert_same(steps(datasets[kind], ranks, 0, STEPS), expected)
    assert_same(
        steps(datasets[kind], 1, 0, 60) + steps(datasets[kind], 4, 60, 70) + steps(datasets[kind], 2, 130, 70), expected
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [1, 4])
def test_with_any_number_of_workers(datasets, kind, workers):
    expected = steps(datasets[kind], 1, 0, STEPS)
    cut = 0 if workers == 1 else 150  # they resume, too
    assert_same(steps(datasets[kind], 1, cut, STEPS - cut, workers=workers, prefetch=4), expected[cut:])
