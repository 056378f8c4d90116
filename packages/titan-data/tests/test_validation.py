import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from titan_data.config import DataConfig
from titan_data.dataset import open_dataset
from titan_data.errors import DataError
from titan_data.validation import ValidationSet
from titan_data.windows import TokenWindows


@pytest.fixture(scope="module")
def data(bpe_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("validation")
    (folder / "a.txt").write_text("Whose woods these are, 東京?\n" * 20)
    (folder / "b.txt").write_text("Größe 🙂")
    return open_dataset(DataConfig(source=str(folder), tokenizer=str(bpe_folder), cache_dir=str(folder / "cache")))


@pytest.fixture(scope="module")
def make(data):
    return lambda **options: ValidationSet("poems", TokenWindows(data, seq_len=16), data.tokenizer, **options)


@given(ranks=st.integers(1, 8), rows=st.integers(1, 7))
def test_each_row_is_read_once_on_any_number_of_ranks(make, ranks, rows):
    validation = make()
    shares = [list(validation.batches(rank=rank, ranks=ranks, rows=rows)) for rank in range(ranks)]
    assert {len(share) for share in shares} == {-(-len(validation) // (ranks * rows))}
    batches = [batch for step in zip(*shares, strict=True) for batch in step]
    ids = torch.cat([batch["sample_ids"] for batch in batches])
    assert ids[ids != -1].tolist() == list(range(len(validation)))
    for batch in batches:
        assert {name: tuple(value.shape) for name, value in batch.items() if name != "sample_ids"} == dict.fromkeys(
            ("tokens", "labels", "positions", "document_ids"), (rows, 16)
        )
        assert batch["labels"][batch["sample_ids"] == -1].eq(-100).all()


@given(ranks=st.integers(1, 4), rows=st.integers(1, 3))
def test_the_bytes_are_those_of_the_text(make, data, ranks, rows):
    validation = make()
    counted = sum(
        validation.count_bytes(batch["labels"])
        for rank in range(ranks)
        for batch in validation.batches(rank=rank, ranks=ranks, rows=rows)
    )
    size = len(("Whose woods these are, 東京?\n" * 20 + "Größe 🙂").encode())
    first = data.tokenizer.decode([int(data.store.read(0, 1)[0])])  # which no window asks for
    assert counted == size - len(first.encode())


def test_bits_per_byte_of_a_model_that_knows_nothing(make, data):
    validation = make()
    labels = torch.cat([batch["labels"] for batch in validation.batches(rows=4)])
    loss = (labels != -100).sum().item() * math.log(data.vocab_size)
    bits = loss / math.log(2) / validation.count_bytes(labels)
    assert bits == pytest.approx(math.log2(data.vocab_size) * (data.token_count - 1) / validation.count_bytes(labels))


@pytest.mark.parametrize("count", [1, 3, 10, 10**6])
def test_part_of_a_set_is_spread_over_it_whatever_the_layout(make, count):
    validation = make(max_rows=count)
    ids = next(validation.batches(rows=len(validation)))["sample_ids"].numpy()
    n = len(make())
    assert len(ids) == min(count, n)
    assert (np.diff(ids) > 0).all()
    assert ids.max() >= n - -(-n // len(ids))
    other = [batch["sample_ids"] for rank in range(2) for batch in validation.batches(rank=rank, ranks=2, rows=1)]
    assert set(torch.cat(other).tolist()) - {-1} == set(ids.tolist())


def test_refuses_what_means_nothing(make, data):
    with pytest.raises(DataError, match=r"validation\.max_rows is 0"):
        make(max_rows=0)
    for share in ({"rank": 2, "ranks": 2, "rows": 1}, {"rank": 0, "ranks": 1, "rows": 0}):
        with pytest.raises(ValueError, match="there is no such share"):
            list(make().batches(**share))

    class Empty:
        def __len__(self):
            return 0

    with pytest.raises(DataError, match="the validation set none has no rows"):
        ValidationSet("none", Empty(), data.tokenizer)
