import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from titan_data import tokenizing
from titan_data.config import DataConfig
from titan_data.errors import DataError
from titan_data.source import source_bytes
from titan_data.sources import open_source
from titan_data.token_store import open_store
from titan_data.tokenizer_files import load_tokenizer
from titan_data.tokenizing import messages, tokenize_source


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def lines(tmp_path, source_file):
    """A source of some hundred lines, in two files that make many parts."""

    def lines(bad_line=None):
        for name in ("a", "b"):
            texts = [json.dumps({"text": f"Whose woods {name} {i}\n" * (i % 5)}) for i in range(300)]
            if bad_line is not None and name == "b":
                texts[bad_line - 1] = "bad"
            (tmp_path / f"{name}.jsonl").write_text("\n".join(texts))
        config = DataConfig(source=str(tmp_path / "?.jsonl"))
        return open_source(config, cache=tmp_path / "cache", progress=lambda message: None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titan_data.jsonl.PART_BYTES", 1000)
        yield lines


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_tokens_are_as_narrow_as_the_vocabulary_allows(target, pieces_source, words, vocab_size, dtype):
    tokenize_source(target, pieces_source((f"0 {vocab_size - 1}", True)), words(vocab_size))
    store = open_store(target)
    assert store.manifest.token_type == store.shard(0).dtype.name == dtype
    assert store.read(0, 3).tolist() == [0, vocab_size - 1, 7]


@pytest.mark.parametrize("pieces", [[], [("", True)], [("  ", True), ("", True)]])
def test_an_empty_corpus_is_refused(target, pieces_source, words, pieces):
    with pytest.raises(DataError, match=r"the corpus is empty: 2 files, with 0 tokens, and it takes at least 2"):
        tokenize_source(target, pieces_source(*pieces), words())


def test_the_folder_is_the_same_for_any_number_of_workers(tmp_path, lines, bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    for workers in (1, 2, 3):
        (tmp_path / str(workers)).mkdir()
        tokenize_source(tmp_path / str(workers), lines(), tokenizer, workers=workers, shard_bytes=10_000)
    one = contents(tmp_path / "1")
    assert len([name for name in one if name.startswith("shard-")]) == 4
    assert {"manifest.json", "documents.bin", "tokenizer/tokenizer.json"} <= set(one)
    assert contents(tmp_path / "2") == one
    assert contents(tmp_path / "3") == one


def test_shards_change_files_but_not_the_stream(tmp_path, lines, bpe_folder):
    stores = []
    for size in (2_000, 10_000_000):
        (tmp_path / str(size)).mkdir()
        tokenize_source(tmp_path / str(size), lines(), load_tokenizer(bpe_folder), shard_bytes=size)
        stores.append(open_store(tmp_path / str(size)))
    many, one = stores
    assert len(many.manifest.shards) > 10
    assert len(one.manifest.shards) == 1
    assert many.manifest.fingerprint == one.manifest.fingerprint
    np.testing.assert_array_equal(many.read(0, many.token_count), one.read(0, one.token_count))
    np.testing.assert_array_equal(many.document_starts, one.document_starts)


KILLED = """
import os, signal, sys
from pathlib import Path
from titan_data import jsonl, tokenizing
from titan_data.config import DataConfig
from titan_data.sources import open_source
from titan_data.tokenizer_files import load_tokenizer
jsonl.PART_BYTES = 1000
source = open_source(DataConfig(source=sys.argv[1]), cache=Path(sys.argv[2]), progress=lambda message: None)
shards = 0
def kill_in_the_fourth_shard(size, tokens):
    if len(list(Path(sys.argv[4]).glob("shard-*.json"))) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
tokenizing.tokenize_source(
    Path(sys.argv[4]), source, load_tokenizer(Path(sys.argv[3])), shard_bytes=4000, report=kill_in_the_fourth_shard
)
"""


def test_killed_half_way_whole_shards_stay(tmp_path, target, lines, bpe_folder, monkeypatch):
    source = lines()
    arguments = [str(tmp_path / "?.jsonl"), str(tmp_path / "cache"), str(bpe_folder), str(target)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments])
    assert killed.returncode == -signal.SIGKILL
    assert not (target / "manifest.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in target.glob("shard-0000[012].tokens.bin")}
    assert len(before) == 3

    made = []
    make = tokenizing.make_shard
    monkeypatch.setattr(tokenizing, "make_shard", lambda shard, **rest: made.append(shard.index) or make(shard, **rest))
    done = []
    report = lambda size, tokens: done.append((size, tokens))  # noqa: E731
    manifest = tokenize_source(target, source, load_tokenizer(bpe_folder), shard_bytes=4000, report=report)
    assert made == list(range(3, len(manifest.shards)))
    assert {name: (target / name).stat().st_mtime_ns for name in before} == before
    assert sum(size for size, _ in done) == source_bytes(source)

    other = tmp_path / "other"
    other.mkdir()
    tokenize_source(other, source, load_tokenizer(bpe_folder), shard_bytes=4000)
    assert contents(other) == contents(target)


def test_a_damaged_shard_of_an_unfinished_build_is_made_again(target, lines, bpe_folder, monkeypatch):
    source, tokenizer = lines(), load_tokenizer(bpe_folder)
    publish = tokenizing.write_manifest
    monkeypatch.setattr(tokenizing, "write_manifest", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tokenize_source(target, source, tokenizer, shard_bytes=4000)
    os.truncate(target / "shard-00001.tokens.bin", 10)
    (target / "shard-00002.json").write_text("{")
    monkeypatch.setattr(tokenizing, "write_manifest", publish)
    tokenize_source(target, source, tokenizer, shard_bytes=4000)
    assert open_store(target).token_count > 1000


def test_a_finished_folder_is_left_as_it_is(target, lines, bpe_folder, monkeypatch):
    source, tokenizer = lines(), load_tokenizer(bpe_folder)
    first = tokenize_source(target, source, tokenizer)
    monkeypatch.setattr(tokenizing, "make_shard", None)
    done = []
    report = lambda size, tokens: done.append((size, tokens))  # noqa: E731
    assert tokenize_source(target, source, tokenizer, report=report) == first
    assert done == [(source_bytes(source), first.tokens)]


def test_a_folder_of_something_else_is_refused(target, lines, bpe_folder, words, pieces_source):
    source, tokenizer = lines(), load_tokenizer(bpe_folder)
    (target / "precious.txt").write_text("x")
    with pytest.raises(DataError, match=r"is not empty: it holds precious\.txt"):
        tokenize_source(target, source, tokenizer)
    (target / "precious.txt").unlink()
    tokenize_source(target, source, tokenizer)
    with pytest.raises(DataError, match=r"holds other tokens: those of .*\.jsonl: 2 files"):
        tokenize_source(target, pieces_source(("1 2", True)), words())
    (target / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"are damaged .*Delete the folder"):
        tokenize_source(target, source, tokenizer)


def test_an_unfinished_build_of_something_else_is_refused(target, lines, bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    with pytest.raises(DataError, match=r"b\.jsonl, line 200: not JSON"):
        tokenize_source(target, lines(bad_line=200), tokenizer)
    with pytest.raises(DataError, match="holds a build of another corpus or tokenizer"):
        tokenize_source(target, lines(), tokenizer)


def test_an_error_in_a_worker_names_file_and_line(target, lines, bpe_folder):
    with pytest.raises(DataError, match=r"b\.jsonl, line 200: not JSON"):
        tokenize_source(target, lines(bad_line=200), load_tokenizer(bpe_folder), workers=2, shard_bytes=5000)
    assert not (target / "manifest.json").exists()


class Dies:
    """A part whose reading kills the process."""

    size_bytes = 10

    def pieces(self, counts):
        os.kill(os.getpid(), signal.SIGKILL)
        yield


def test_a_worker_that_dies_is_an_error_not_a_hang(target, pieces_source, bpe_folder):
    source = pieces_source(("1", True))
    source.parts = [Dies(), Dies()]
    began = time.monotonic()
    with pytest.raises(DataError, match="a process that tokenized has died"):
        tokenize_source(target, source, load_tokenizer(bpe_folder), workers=2, shard_bytes=1)
    assert time.monotonic() - began < 60


SLOW_WORKERS = """
import os, sys, time
from pathlib import Path
from titan_data.tokenizer_files import load_tokenizer
from titan_data.tokenizing import tokenize_source

class Slow:
    size_bytes = 1
    def pieces(self, counts):
        Path(sys.argv[1], f"{os.getpid()}.lock").touch()
        time.sleep(60)
        yield

class Source:
    fingerprint = "slow"
    parts = [Slow(), Slow()]

if __name__ == "__main__":
    tokenize_source(Path(sys.argv[1]), Source(), load_tokenizer(Path(sys.argv[2])), workers=2, shard_bytes=1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_end_with_their_parent(tmp_path, target, bpe_folder):
    (tmp_path / "program.py").write_text(SLOW_WORKERS)
    parent = subprocess.Popen([sys.executable, tmp_path / "program.py", target, bpe_folder])
    wait_until(lambda: len(list(target.glob("*.lock"))) == 2)
    parent.kill()
    parent.wait()
    workers = [path.stem for path in target.glob("*.lock")]
    wait_until(lambda: not any(Path("/proc", pid).exists() for pid in workers))


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_no_workers_are_refused(target, lines, bpe_folder):
    with pytest.raises(DataError, match="0 workers cannot tokenize"):
        tokenize_source(target, lines(), load_tokenizer(bpe_folder), workers=0)
    with pytest.raises(DataError, match="a shard of -5 bytes of text is none"):
        tokenize_source(target, lines(), load_tokenizer(bpe_folder), shard_bytes=-5)


def test_a_faster_engine_is_looked_for_only_for_much_text(target, tmp_path, lines, bpe_folder, monkeypatch):
    source = lines()
    assert tokenize_source(target, source, load_tokenizer(bpe_folder)).tokenizer.engine == "tokenizers"
    monkeypatch.setattr(tokenizing, "_MUCH_BYTES", 100)
    other = tmp_path / "other"
    other.mkdir()
    assert tokenize_source(other, source, load_tokenizer(bpe_folder)).tokenizer.engine == "tiktoken"
    for name in ("shard-00000.tokens.bin", "documents.bin"):
        assert (other / name).read_bytes() == (target / name).read_bytes()


def test_messages_tell_share_and_tokens_now_and_then(monkeypatch):
    said = []
    report = messages(said.append, 200)
    report(50, 10)
    assert not said
    monkeypatch.setattr(tokenizing, "_SECONDS_BETWEEN_MESSAGES", -1)
    report(50, 1000)
    assert said == ["tokenizing: 50% of the text, 1,010 tokens"]
