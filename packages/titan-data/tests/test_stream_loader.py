import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.stateful import Stateful

from ranks import run_ranks
from titan_data.config import DataConfig
from titan_data.errors import DataError
from titan_data.sources import open_source
from titan_data.stream_loader import StreamLoader
from titan_data.stream_rows import StreamRows
from titan_data.streams import SourceStreams
from titan_data.tokenizer_files import load_tokenizer

B, STREAMS = 16, 8


@pytest.fixture(scope="module")
def streams(bpe_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    (folder / "text").mkdir()
    for number in range(20):
        (folder / "text" / f"{number}.txt").write_text(f"Whose woods these are, {number}.\n" * (number + 1))
    source = open_source(DataConfig(source=str(folder / "text")), cache=folder / "cache", progress=lambda message: None)
    return StreamRows(SourceStreams(source, seed=1), load_tokenizer(bpe_folder), STREAMS, 16)


@pytest.fixture
def make(streams):
    loaders = []

    def make(ranks=1, rank=0, **options):
        options = {"global_batch_size": B, "rows": B // ranks, "rank": rank, "prefetch": 0} | options
        loaders.append(StreamLoader(streams, **options))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def joined(loaders):
    parts = [next(loader) for loader in loaders]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[name], other[name]) for name in batch)


def merged(loaders):
    """What a checkpoint of all ranks holds."""
    states = [pickle.loads(pickle.dumps(loader.state_dict())) for loader in loaders]
    return states[0] | {"streams": {key: value for state in states for key, value in state["streams"].items()}}


def test_batches_are_those_of_a_loader(make):
    batch = next(make(ranks=2, rank=1))
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "tokens": (8, 16),
        "labels": (8, 16),
        "positions": (8, 16),
        "document_ids": (8, 16),
        "sample_ids": (8,),
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["sample_ids"].tolist() == [4, 12, 5, 13, 6, 14, 7, 15]


def test_on_any_number_of_ranks_and_after_changes_of_it(make):
    whole = make()
    expected = [next(whole) for _ in range(200)]
    for ranks in (2, 4, 8):
        loaders = [make(ranks, rank) for rank in range(ranks)]
        assert_same([joined(loaders) for _ in range(200)], expected)
    found, state = [], None
    for ranks, count in ((1, 60), (4, 70), (2, 70)):
        loaders = [make(ranks, rank) for rank in range(ranks)]
        for loader in loaders:
            if state:
                loader.load_state_dict(state)
        found += [joined(loaders) for _ in range(count)]
        state = merged(loaders)
    assert_same(found, expected)
    assert whole.epoch > 1


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("workers", [1, 4])
def test_with_any_number_of_workers_and_after_changes_of_it(make, workers):
    whole = make()
    expected = [next(whole) for _ in range(60)]
    first = make(workers=workers, prefetch=2)
    found = [next(first) for _ in range(30)]
    second = make()
    second.load_state_dict(merged([first]))
    assert second.epoch == int(first.epoch)
    assert_same(found + [next(second) for _ in range(30)], expected)
    assert 0 < first.epoch < second.epoch == whole.epoch
    assert second.epoch % 1


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_resumes_after_what_was_taken_not_after_what_was_read_ahead(make, prefetch):
    whole = make()
    expected = [next(whole) for _ in range(12)]
    first = make(prefetch=prefetch)
    assert isinstance(first, Stateful)
    assert_same([next(first) for _ in range(5)], expected[:5])
    second = make(prefetch=prefetch)
    second.load_state_dict(merged([first]))
    assert_same([next(second) for _ in range(7)], expected[5:])
    first.load_state_dict(merged([make()]))
    assert_same([next(first) for _ in range(3)], expected[:3])


def test_a_checkpoint_of_two_ranks_goes_on_with_four(streams, make, tmp_path):
    def run(begin, count):
        rank, ranks = dist.get_rank(), dist.get_world_size()
        loader = StreamLoader(streams, global_batch_size=B, rows=B // ranks, rank=rank, prefetch=0)
        if begin:
            dcp.load({"data": loader}, checkpoint_id=tmp_path)
        batches = [{name: tensor.numpy() for name, tensor in next(loader).items()} for _ in range(count)]
        if not begin:
            dcp.save({"data": loader}, checkpoint_id=tmp_path)
        return batches

    whole = make()
    expected = [next(whole) for _ in range(8)]
    found = []
    for ranks, begin, count in ((2, 0, 5), (4, 5, 3)):
        shares = run_ranks(ranks, run, begin, count)
        found += [
            {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
            for parts in zip(*shares, strict=True)
        ]
    assert_same(found, expected)


def test_an_error_is_raised_and_the_batch_can_be_asked_for_again(streams, make, monkeypatch):
    whole = make()
    expected = [next(whole) for _ in range(3)]
    loader = make()
    assert_same([next(loader)], expected[:1])
    with monkeypatch.context() as patch:
        patch.setattr(type(streams), "open", lambda *args: (_ for _ in ()).throw(DataError("the disk went away")))
        loader.close()
        with pytest.raises(DataError, match="the disk went away"):
            next(loader)
    assert_same([next(loader), next(loader)], expected[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 12}, "12 rows cannot take equally many of 8 streams"),
        ({"rows": 1}, "does not read whole streams"),
        ({"rows": 0}, "does not read whole streams"),
        ({"rank": 1}, "does not read whole streams"),
        ({"workers": 9}, "9 workers cannot share out the 8 streams"),
        ({"workers": 1, "prefetch": 0}, "prefetch is 0"),
        ({"timeout_seconds": 0}, "timeout_seconds is 0"),
    ],
)
def test_refuses_what_cannot_be_shared_out(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_refuses_the_state_of_something_else(make):
    with pytest.raises(ValueError, match=r"lacks \[0, 1, 2, 3, 4, 5, 6, 7\]"):
        make().load_state_dict({"next_batch": 3})
    half = make(ranks=2, rank=0).state_dict()
    with pytest.raises(ValueError, match=r"lacks \[4, 5, 6, 7\]"):
        make().load_state_dict(half)
