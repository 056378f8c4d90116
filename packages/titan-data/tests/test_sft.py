import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from ranks import run_ranks
from titan_data import sft
from titan_data.config import DataConfig
from titan_data.errors import DataError
from titan_data.loader import BatchLoader
from titan_data.sft import open_sft
from titan_data.sft_config import SFTConfig
from titan_data.sources import NAMED


@pytest.fixture
def config(tmp_path):
    return DataConfig(source="conversations", vocab_size=600, cache_dir=str(tmp_path / "cache"))


LLAMA = SFTConfig(template="llama3")


def test_the_shipped_conversations_become_rows(config):
    data = open_sft(config, LLAMA, seq_len=512)
    assert data.vocab_size == 600
    batch = data.read(np.arange(len(data)))
    text = data.tokenizer.decode(batch["tokens"][0].tolist())
    assert text.startswith("<|begin_of_text|><|start_header_id|>")
    learned = batch["labels"][batch["labels"] != -100]
    assert len(learned) == data.rows.store.learned.sum()
    assert learned.min() >= 0
    assert len(learned) < (batch["tokens"] != data.rows.pad_id).sum()
    assert data.tokens_per_row > 0.9 * 512
    assert data.describe().splitlines()[0].startswith(f"conversations {data.fingerprint[:12]}: 66 with")
    assert "0 conversations truncated, 0 left out" in data.describe()


def test_the_second_time_nothing_is_tokenized_or_planned(config, monkeypatch):
    first = open_sft(config, LLAMA, seq_len=256)

    def never(*args, **kwargs):
        raise AssertionError("the cache was not used")

    for name in ("store_conversations", "plan_packs"):
        monkeypatch.setattr(sft, name, never)
    again = open_sft(config, LLAMA, seq_len=256)
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.read(np.arange(4))["labels"], first.read(np.arange(4))["labels"])


def test_processes_that_start_together_agree(config):
    def rank():
        data = open_sft(config, LLAMA, seq_len=256)
        return data.fingerprint, data.read(np.arange(len(data)))["tokens"].sum()

    assert len(set(run_ranks(3, rank))) == 1


def test_too_long_conversations_are_counted_by_policy(config):
    dropped = open_sft(config, LLAMA, seq_len=100)
    assert dropped.rows.packs.dropped > 10
    assert f"{dropped.rows.packs.dropped} left out" in dropped.describe()
    truncated = open_sft(config, dataclasses.replace(LLAMA, too_long="truncate"), seq_len=100)
    packs = truncated.rows.packs
    assert packs.truncated > 0
    assert packs.truncated + packs.dropped == dropped.rows.packs.dropped
    with pytest.raises(DataError, match=r"none of the 66 conversations .* fits into a row of 4 tokens"):
        open_sft(config, LLAMA, seq_len=4)


def test_it_is_said_when_most_conversations_are_too_long(config):
    said = []
    data = open_sft(config, LLAMA, seq_len=80, progress=said.append)
    (warning,) = [message for message in said if message.startswith("warning")]
    assert f"{data.rows.packs.dropped} of the 66 conversations of" in warning
    assert "do not fit into a row of 80 tokens. Choose longer rows" in warning
    said.clear()
    open_sft(config, LLAMA, seq_len=512, progress=said.append)
    assert not any("warning" in message for message in said)


def test_an_empty_file_is_named(config, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"there are no conversations in .*empty\.jsonl: 1 files \(1 of them empty\)"):
        open_sft(change(config, source=str(tmp_path / "empty.jsonl")), LLAMA, seq_len=64)


def test_the_fingerprint_follows_what_the_rows_depend_on(config, chat_folder, tmp_path):
    base = change(config, tokenizer=str(chat_folder), vocab_size=DataConfig.vocab_size)
    data = open_sft(base, LLAMA, seq_len=256)
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(NAMED["conversations"].source).read_bytes())
    assert open_sft(change(base, source=str(moved)), LLAMA, seq_len=256).fingerprint == data.fingerprint
    for other in (
        open_sft(base, SFTConfig(template="chatml"), seq_len=256),
        open_sft(base, dataclasses.replace(LLAMA, pack=False), seq_len=256),
        open_sft(base, dataclasses.replace(LLAMA, too_long="truncate"), seq_len=256),
    ):
        assert other.fingerprint != data.fingerprint


def change(config, **options):
    return dataclasses.replace(config, **options)


def test_feeds_a_loader_and_a_worker(config):
    data = open_sft(config, LLAMA, seq_len=128)
    loader = BatchLoader(data, global_batch_size=4, seed=0)
    batch = next(loader)
    loader.close()
    assert batch["tokens"].shape == (4, 128)
    sent = pickle.loads(pickle.dumps(data))
    np.testing.assert_array_equal(sent.read(batch["sample_ids"].numpy())["tokens"], batch["tokens"].numpy())


def test_a_broken_line_is_named_and_nothing_is_cached(config, tmp_path, chat_folder):
    path = tmp_path / "chats.jsonl"
    good = {"prompt": "Hi", "completion": "Hello"}
    path.write_text(json.dumps(good) + "\n" + json.dumps({"prompt": "Hi"}) + "\n")
    config = DataConfig(source=str(path), tokenizer=str(chat_folder), cache_dir=config.cache_dir)
    with pytest.raises(DataError, match=r"chats\.jsonl, line 2: no conversation"):
        open_sft(config, LLAMA, seq_len=64)
    path.write_text(json.dumps(good) + "\n")
    assert len(open_sft(config, LLAMA, seq_len=64)) == 1


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({"text_field": "x"}, {}, r"data\.text_field is set, but conversations are recognised"),
        ({"template": "{x}"}, {}, r"data\.template is set"),
        ({"confine_attention": False}, {}, r"data\.confine_attention is off"),
        ({}, {"too_long": "cut"}, r"data\.sft\.too_long is 'cut'"),
        ({}, {"date": "26 Jul"}, r"data\.sft\.date is '26 Jul'"),
        ({}, {"template": "auto"}, r"has the control tokens of a built-in template, and sft\.template is 'auto'"),
        ({"vocab_size": 100}, {}, "a byte-level vocabulary has at least"),
    ],
)
def test_options_that_cannot_take_effect_are_refused(config, data, options, message):
    with pytest.raises(DataError, match=message):
        open_sft(change(config, **data), dataclasses.replace(LLAMA, **options), seq_len=64)
    with pytest.raises(DataError, match="seq_len is 0"):
        open_sft(config, LLAMA, seq_len=0)
