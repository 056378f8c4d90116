import dataclasses
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from ranks import run_ranks
from titan_data import bpe, dataset, shards, tokenizing
from titan_data.config import DataConfig
from titan_data.dataset import open_dataset
from titan_data.errors import DataError
from titan_data.loader import BatchLoader


@pytest.fixture
def config(corpus_folder, tmp_path):
    return DataConfig(source=str(corpus_folder), vocab_size=300, cache_dir=str(tmp_path / "cache"))


def tokens_of(data):
    return data.store.read(0, data.token_count).tolist()


def change(config, **options):
    return dataclasses.replace(config, **options)


def test_text_becomes_tokens_and_back(config, corpus_folder):
    data = open_dataset(config)
    texts = [path.read_bytes().decode() for path in sorted(corpus_folder.iterdir())]
    assert data.document_count == 3
    assert data.document_starts.tolist()[-1] == data.token_count
    for text, start, end in zip(texts, data.document_starts, data.document_starts[1:], strict=False):
        assert data.store.read(end - 1, end) == data.eos_id
        assert data.tokenizer.decode(data.store.read(start, end - 1)) == text
    assert data.vocab_size == 300


def test_the_second_time_nothing_is_read_or_tokenized(config, corpus_folder, monkeypatch):
    for path in corpus_folder.iterdir():
        os.utime(path, (1_600_000_000, 1_600_000_000))
    messages = []
    first = open_dataset(config, progress=messages.append)
    assert [message.split()[0] for message in messages] == ["reading", "training", "tokenizing", "tokenized"]

    def never(*args, **kwargs):
        raise AssertionError("the cache was not used")

    monkeypatch.setattr(bpe, "train_bpe", never)
    monkeypatch.setattr(dataset, "tokenize_source", never)
    again = []
    second = open_dataset(config, progress=again.append)
    assert not again
    assert second.fingerprint == first.fingerprint
    np.testing.assert_array_equal(tokens_of(second), tokens_of(first))


def test_processes_that_start_together_tokenize_once(config):
    def rank():
        messages = []
        data = open_dataset(config, progress=messages.append)
        return data.fingerprint, tokens_of(data), messages

    results = run_ranks(4, rank)
    assert len({fingerprint for fingerprint, _, _ in results}) == 1
    assert all(tokens == results[0][1] for _, tokens, _ in results)
    said = [message for _, _, messages in results for message in messages]
    assert sum(message.startswith("tokenized") for message in said) == 1
    assert sum(message.startswith("training") for message in said) == 1


def test_killed_while_tokenizing_it_starts_over(config, monkeypatch):
    monkeypatch.setattr(shards, "_BATCH_CHARS", 1)
    monkeypatch.setattr(tokenizing, "_SECONDS_BETWEEN_MESSAGES", -1)

    def die_half_way(message):
        if message.startswith("tokenizing: "):
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        open_dataset(config, progress=die_half_way)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    data = open_dataset(config)
    assert data.document_count == 3
    assert not list(data.store.folder.parent.glob("*.partial"))


def test_a_damaged_cache_is_built_again_with_a_notice(config):
    first = open_dataset(config)
    tokens = tokens_of(first)
    file = first.store.folder / "shard-00000.tokens.bin"
    os.truncate(file, file.stat().st_size - 2)
    messages = []
    assert tokens_of(open_dataset(config, progress=messages.append)) == tokens
    assert any("token cache" in message and "damaged (shard-00000.tokens.bin has" in message for message in messages)


def test_the_fingerprint_follows_content_and_tokenizer_not_places(config, corpus_folder, bpe_folder, tmp_path):
    moved = shutil.copytree(corpus_folder, tmp_path / "moved")
    fingerprint = open_dataset(config).fingerprint
    assert open_dataset(change(config, source=str(moved))).fingerprint == fingerprint
    assert open_dataset(change(config, cache_dir=str(tmp_path / "other"))).fingerprint == fingerprint
    assert open_dataset(change(config, vocab_size=280)).fingerprint != fingerprint
    other = change(config, tokenizer=str(bpe_folder), vocab_size=DataConfig.vocab_size)
    assert open_dataset(other).fingerprint != fingerprint
    (moved / "0.txt").write_text("something else")
    assert open_dataset(change(config, source=str(moved))).fingerprint != fingerprint


def test_a_trained_tokenizer_saved_elsewhere_is_the_same_one(config, tmp_path):
    data = open_dataset(config)
    for name, content in data.tokenizer.files.items():
        (tmp_path / name).write_bytes(content)
    again = open_dataset(change(config, tokenizer=str(tmp_path), vocab_size=DataConfig.vocab_size))
    assert again.fingerprint == data.fingerprint


def test_jsonl(config, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"body": "first"}\n{"body": ""}\n{"body": "second one"}\n')
    data = open_dataset(change(config, source=str(path), text_field="body"))
    assert data.document_count == 2
    assert "1 empty documents left out" in data.describe()
    with pytest.raises(DataError, match=r"lines\.jsonl, line 1: no field 'text'"):
        open_dataset(change(config, source=str(path)))


def test_describe_is_a_small_tree(config):
    lines = open_dataset(config).describe().splitlines()
    assert len(lines) == 4
    assert "tokens in 3 documents" in lines[0]
    assert [line[:4] for line in lines[1:]] == ["├── ", "├── ", "└── "]


def test_killed_between_shards_it_goes_on_with_what_is_missing(config, monkeypatch):
    monkeypatch.setattr(tokenizing, "SHARD_BYTES", 1)
    monkeypatch.setattr(tokenizing, "_SECONDS_BETWEEN_MESSAGES", -1)
    monkeypatch.setattr(tokenizing.tokenize_source, "__kwdefaults__", {"workers": 1, "shard_bytes": 1, "report": None})
    said = []

    def interrupt_in_the_second_shard(message):
        said.append(message)
        if sum(line.startswith("tokenizing: ") for line in said) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_dataset(config, progress=interrupt_in_the_second_shard)
    made = []
    make = tokenizing.make_shard
    monkeypatch.setattr(tokenizing, "make_shard", lambda shard, **rest: made.append(shard.index) or make(shard, **rest))
    assert open_dataset(config).document_count == 3
    assert made == [1, 2]


def test_a_folder_of_tokens_needs_no_text_and_no_tokenizer(config, bpe_folder, tmp_path, monkeypatch):
    text = open_dataset(config)
    folder = shutil.copytree(text.store.folder, tmp_path / "tokens")
    shutil.rmtree(config.source)
    shutil.rmtree(config.cache_dir)
    data = open_dataset(DataConfig(source=str(folder)))
    assert "tokenizer" not in vars(data)
    assert (data.fingerprint, data.vocab_size, data.eos_id) == (text.fingerprint, text.vocab_size, text.eos_id)
    assert tokens_of(data) == tokens_of(text)
    assert dict(data.tokenizer.files) == dict(text.tokenizer.files)
    assert data.describe().splitlines()[:3] == text.describe().splitlines()[:3]
    assert open_dataset(DataConfig(source=str(folder), tokenizer=str(folder / "tokenizer"))).eos_id == data.eos_id


def test_a_folder_of_tokens_refuses_options_that_come_too_late(config, bpe_folder, tmp_path):
    folder = shutil.copytree(open_dataset(config).store.folder, tmp_path / "tokens")
    with pytest.raises(DataError, match=r"which is another tokenizer than data\.tokenizer"):
        open_dataset(DataConfig(source=str(folder), tokenizer=str(bpe_folder)))
    for options in ({"vocab_size": 300}, {"text_field": "x"}, {"template": "{x}"}, {"format": "text"}):
        with pytest.raises(DataError, match=rf"data\.{next(iter(options))} is set, but .* is tokenized already"):
            open_dataset(DataConfig(source=str(folder), **options))
    os.truncate(folder / "documents.bin", 8)
    with pytest.raises(DataError, match=r"are damaged \(documents\.bin has 8 bytes"):
        open_dataset(DataConfig(source=str(folder)))


def test_a_source_of_ones_own(config, pieces_source, tmp_path):
    source = pieces_source(("Whose woods", True), ("are these", True))
    data = open_dataset(change(config, source="unused"), source=source)
    assert data.document_count == 2
    assert "source: 2 files" in data.describe()


def test_workers_make_no_difference(config):
    alone = open_dataset(config)
    several = open_dataset(change(config, tokenize_workers=2, cache_dir=config.cache_dir + "2"))
    assert several.store.manifest == alone.store.manifest


def test_feeds_a_loader(config):
    data = open_dataset(config)
    loader = BatchLoader(data, seq_len=16, global_batch_size=4, seed=0)
    batch = next(loader)
    assert batch["tokens"].shape == (4, 16)
    assert batch["tokens"].max() < data.vocab_size
    loader.close()


def test_an_empty_corpus_is_refused_and_nothing_is_cached(config, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"the corpus is empty: .*empty\.txt"):
        open_dataset(change(config, source=str(tmp_path / "empty.txt")))
    assert [path.suffix for path in (tmp_path / "cache" / "tokens").iterdir()] == [".lock"]


def test_a_size_for_a_vocabulary_that_is_not_trained_is_refused(config, bpe_folder):
    with pytest.raises(DataError, match=r"data\.vocab_size is 300, but only a trained BPE"):
        open_dataset(change(config, tokenizer=str(bpe_folder)))


BIG_DOCUMENT = """
import re, resource, sys
from pathlib import Path
from titan_data.config import DataConfig
from titan_data.dataset import open_dataset
data = open_dataset(DataConfig(source=sys.argv[1], tokenizer=sys.argv[2], cache_dir=sys.argv[3]))
if sys.platform == "linux":  # where ru_maxrss also counts the process that has started this one
    peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(data.document_count, data.token_count, peak)
"""


@pytest.mark.slow
def test_a_document_of_200_megabytes_takes_no_more_memory_than_a_small_one(tmp_path, bpe_folder):
    with (tmp_path / "big.txt").open("w") as file:
        for i in range(2000):
            file.write(f"line {i} of a very long document, with some words in it\n" * 1800)
    assert (tmp_path / "big.txt").stat().st_size > 200e6
    run = subprocess.run(
        [sys.executable, "-c", BIG_DOCUMENT, tmp_path / "big.txt", bpe_folder, tmp_path / "cache"],
        capture_output=True,
        text=True,
        check=True,
    )
    documents, tokens, peak = map(int, run.stdout.split())
    assert documents == 1
    assert tokens > 20e6
    assert peak < 500e6
