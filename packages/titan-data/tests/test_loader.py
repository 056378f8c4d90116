import os
import signal
import threading
import traceback

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.stateful import Stateful

from titan_data.errors import ReadingError
from titan_data.loader import BatchLoader
from titan_data.order import ShuffledRows
from titan_data.windows import TokenWindows, count_windows

KEYS = {"tokens", "labels", "positions", "document_ids", "sample_ids"}


@pytest.fixture
def stream(make_stream):
    return make_stream(np.random.default_rng(0).integers(1, 30, size=40))


@pytest.fixture
def make(stream):
    """Loaders that are closed when the test is over."""
    loaders = []

    def make(**options):
        defaults = {"dataset": stream, "seq_len": 8, "global_batch_size": 6, "seed": 3}
        loaders.append(BatchLoader(**(defaults | options)))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def take(loader, count):
    return [next(loader) for _ in range(count)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys() == KEYS
        for key in KEYS:
            assert torch.equal(batch[key], other[key]), key


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_the_ranks_together_read_the_global_batch(make, ranks):
    rows = -(-6 // ranks)
    parts = [take(make(rank=rank, rows=rows), 20) for rank in range(ranks)]
    for t, expected in enumerate(take(make(), 20)):
        joined = {key: torch.cat([part[t][key] for part in parts]) for key in KEYS}
        assert joined["sample_ids"][6:].eq(-1).all()
        assert joined["labels"][6:].eq(-100).all()
        assert_same([{key: value[:6] for key, value in joined.items()}], [expected])


def test_batches_are_int64_of_the_shape_asked_for(make):
    batch = next(make(rank=3, rows=2))
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "tokens": (2, 8),
        "labels": (2, 8),
        "positions": (2, 8),
        "document_ids": (2, 8),
        "sample_ids": (2,),
    }
    assert all(value.dtype == torch.int64 and value.is_contiguous() for value in batch.values())
    assert batch["sample_ids"].tolist() == [-1, -1]
    assert batch["tokens"].eq(0).all()


def test_sample_ids_are_the_windows_that_the_rows_show(make, stream):
    for batch in take(make(), 10):
        for window, row in zip(batch["sample_ids"].tolist(), batch["tokens"], strict=True):
            valid = min(8, len(stream.tokens) - 1 - window * 8)
            assert row[:valid].tolist() == stream.tokens[window * 8 : window * 8 + valid].tolist()


def test_an_epoch_predicts_every_token_but_the_first_once(make, stream):
    n = count_windows(len(stream.tokens), 8)
    labels = torch.cat([batch["labels"] for batch in take(make(global_batch_size=1), n)])
    assert sorted(labels[labels != -100].tolist()) == sorted(stream.tokens[1:].tolist())


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_resumes_after_what_was_taken_not_after_what_was_read_ahead(make, prefetch):
    expected = take(make(prefetch=0), 12)
    first = make(prefetch=prefetch)
    assert_same(take(first, 5), expected[:5])
    state = first.state_dict()
    assert state == {"next_batch": 5}
    second = make(prefetch=prefetch)
    second.load_state_dict(state)
    assert_same(take(second, 7), expected[5:])


def test_goes_on_without_a_gap_or_a_repeat_on_another_number_of_ranks(make):
    expected = [batch["sample_ids"].tolist() for batch in take(make(), 30)]
    got, state = [], {"next_batch": 0}
    for ranks in (1, 4, 3):
        loaders = [make(rank=rank, rows=-(-6 // ranks)) for rank in range(ranks)]
        for loader in loaders:
            loader.load_state_dict(state)
        for parts in zip(*(take(loader, 10) for loader in loaders), strict=True):
            got.append(torch.cat([part["sample_ids"] for part in parts])[:6].tolist())
        state = loaders[-1].state_dict()
    assert got == expected


def test_can_be_set_back_while_it_runs(make):
    loader = make()
    batches = take(loader, 6)
    loader.load_state_dict({"next_batch": 2})
    assert_same(take(loader, 4), batches[2:])


def test_resuming_far_ahead_replays_nothing(make):
    loader = make()
    loader.load_state_dict({"next_batch": 10**15})
    assert next(loader)["sample_ids"].shape == (6,)
    assert loader.state_dict() == {"next_batch": 10**15 + 1}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_is_stateful_and_survives_a_checkpoint(make, tmp_path):
    loader = make()
    assert isinstance(loader, Stateful)
    expected = take(loader, 4)
    saved, restored = make(), make()
    take(saved, 3)
    dcp.save({"data": saved}, checkpoint_id=tmp_path)
    dcp.load({"data": restored}, checkpoint_id=tmp_path)
    assert_same([next(restored)], expected[3:])


def test_epoch_counts_what_was_taken(make, stream):
    loader = make(global_batch_size=2, rank=0, rows=1)
    assert loader.epoch == 0
    take(loader, 5)
    assert loader.epoch == 10 / count_windows(len(stream.tokens), 8)


def test_options_reach_the_order_and_the_rows(make):
    assert next(make(shuffle=False))["sample_ids"].tolist() == [0, 1, 2, 3, 4, 5]
    assert next(make())["sample_ids"].tolist() != next(make(seed=4))["sample_ids"].tolist()
    assert next(make(confine_attention=False))["positions"].eq(torch.arange(8)).all()
    assert not next(make())["positions"].eq(torch.arange(8)).all()


class FailsOnce:
    """A token stream whose disk fails at the n-th reading, and then works again."""

    def __init__(self, stream, failing_read):
        self.stream, self.left = stream, failing_read
        self.document_starts, self.eos_id = stream.document_starts, stream.eos_id
        self.token_count = stream.token_count

    def copy_tokens(self, start, out):
        self.left -= 1
        if self.left == 0:
            raise OSError("the disk went away")
        self.stream.copy_tokens(start, out)


def test_an_error_in_the_thread_is_raised_with_its_place_and_the_batch_can_be_read_again(make, stream):
    rows = 6
    loader = make(dataset=FailsOnce(stream, 3 * rows))
    expected = take(make(), 6)
    assert_same(take(loader, 2), expected[:2])
    with pytest.raises(OSError, match="the disk went away") as caught:
        next(loader)
    assert "cut_windows" in "".join(traceback.format_exception(caught.value))
    assert loader.state_dict() == {"next_batch": 2}
    assert_same(take(loader, 4), expected[2:])


def test_close_stops_the_thread_and_no_prefetch_starts_none(make):
    def running():
        return [thread.name for thread in threading.enumerate() if thread.name == "titan-data"]

    take(make(prefetch=0), 2)
    assert not running()
    loader = make(prefetch=3)
    batches = take(loader, 2)
    assert running()
    loader.close()
    assert not running()
    loader.load_state_dict({"next_batch": 1})
    assert_same([next(loader)], batches[1:])


def test_goes_on_in_a_forked_child(make):
    loader = make(prefetch=2)
    take(loader, 2)
    expected = take(make(), 8)[2:]  # more than the parent's thread has read ahead
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        code = 1
        try:
            assert_same(take(loader, 6), expected)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 0}, "global_batch_size is 0"),
        ({"rows": 0}, "rows is 0"),
        ({"rank": -1}, "rank is -1"),
        ({"prefetch": -1}, "prefetch is -1"),
        ({"seq_len": 0}, "seq_len is 0"),
    ],
)
def test_refuses_sizes_that_mean_nothing(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("state", [{}, {"next_batch": -1}, {"next_batch": "5"}])
def test_refuses_the_state_of_something_else(make, state):
    with pytest.raises(ValueError, match="not the state of a BatchLoader"):
        make().load_state_dict(state)


def test_refuses_options_that_the_dataset_or_the_machine_has_no_use_for(make, stream):
    rows = TokenWindows(stream, seq_len=8)
    samples = ShuffledRows(rows, seed=3)
    for options, message in (
        ({"seq_len": None}, "seq_len is missing"),
        ({"seed": None}, "seed is missing"),
        ({"dataset": rows}, "seq_len and confine_attention are for a token stream"),
        ({"dataset": samples, "seed": None}, "are fixed where samples are put in order. Give them to the ShuffledRows"),
        ({"workers": -1}, "workers is -1"),
        ({"workers": 1, "prefetch": 0}, "prefetch is 0; it must be at least 1"),
        ({"timeout_seconds": 0}, "timeout_seconds is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
    if not torch.accelerator.is_available():
        with pytest.raises(ValueError, match="pin_memory is on, but there is no accelerator"):
            make(pin_memory=True)


def test_rows_and_samples_are_read_as_the_stream_they_come_from(make, stream):
    rows = TokenWindows(stream, seq_len=8)
    expected = take(make(), 5)
    assert_same(take(make(dataset=rows, seq_len=None), 5), expected)
    samples = make(dataset=ShuffledRows(rows, seed=3, name="poems"), seq_len=None, seed=None)
    assert_same(take(samples, 5), expected)
    assert samples.epochs == {"poems": 30 / len(rows)}
    assert samples.epoch == 30 / len(rows)


def test_a_thread_that_hangs_is_an_error_and_the_loader_can_be_closed(make, stream):
    answered = threading.Event()

    class Hangs(FailsOnce):
        def copy_tokens(self, start, out):
            answered.wait()

    loader = make(dataset=Hangs(stream, 0), timeout_seconds=0.2)
    with pytest.raises(ReadingError, match=r"has not come for 0\.2 seconds"):
        next(loader)
    loader.close()
    answered.set()
