import json

import numpy as np
import pytest

from titan_data import shards
from titan_data.shards import Shard, finished_shard, make_shard, plan_shards
from titan_data.token_store import open_store
from titan_data.tokenizing import tokenize_source


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    return folder


def made(shard, folder, tokenizer):
    done = []
    report = lambda size, tokens: done.append((size, tokens))  # noqa: E731
    return make_shard(shard, folder=folder, dtype=np.dtype(np.uint16), tokenizer=tokenizer, report=report), done


def test_a_plan_puts_parts_together_until_there_is_enough(pieces_source):
    source = pieces_source(*[("x" * size, True) for size in (3, 4, 1, 9, 2, 2)], part=1)
    plan = plan_shards(source, 5)
    assert [[part.size_bytes for part in shard.parts] for shard in plan] == [[3, 4], [1, 9], [2, 2]]
    assert [shard.tokens_name for shard in plan][1] == "shard-00001.tokens.bin"
    assert [part for shard in plan for part in shard.parts] == source.parts


def test_a_shard_counts_from_its_own_first_token(target, pieces_source, words):
    parts = pieces_source(("1 2", True), ("", True), ("3", False), ("4", True), part=2).parts
    record, done = made(Shard(4, tuple(parts)), target, words())
    assert np.fromfile(target / "shard-00004.tokens.bin", np.uint16).tolist() == [1, 2, 7, 3, 4, 7]
    assert np.fromfile(target / "shard-00004.documents.bin", np.int64).tolist() == [0, 3]
    assert (record.tokens, record.documents, record.empty_documents) == (6, 2, 1)
    assert [sum(column) for column in zip(*done, strict=True)] == [5, 6]


def test_it_is_finished_when_its_record_and_whole_files_are_there(target, pieces_source, words):
    shard = Shard(0, tuple(pieces_source(("1 2", True)).parts))
    assert finished_shard(shard, target) is None
    record, _ = made(shard, target, words())
    assert finished_shard(shard, target) == record
    for name in (shard.tokens_name, shard.documents_name, shard.record_name):
        content = (target / name).read_bytes()
        (target / name).write_bytes(content[:-1])
        assert finished_shard(shard, target) is None
        (target / name).write_bytes(content)
    (target / shard.record_name).write_text(json.dumps({"tokens": 3}))
    assert finished_shard(shard, target) is None


def test_how_text_is_grouped_makes_no_difference(tmp_path, pieces_source, words, monkeypatch):
    pieces = [("1 2 3", True), ("", True), ("4", False), ("5 6", False), ("", True), ("  ", True), ("8", True)]
    (tmp_path / "a").mkdir()
    tokenize_source(tmp_path / "a", pieces_source(*pieces), words())
    monkeypatch.setattr(shards, "_BATCH_CHARS", 2)
    tokenizer = words()
    (tmp_path / "b").mkdir()
    tokenize_source(tmp_path / "b", pieces_source(*pieces), tokenizer)
    assert len(tokenizer.batches) >= 4
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_text_is_tokenized_a_bounded_amount_at_a_time(target, pieces_source, words):
    piece = "1 " * (1 << 14)
    tokenizer = words()
    tokenize_source(target, pieces_source(*[(piece, False)] * 200, ("", True)), tokenizer)
    assert max(tokenizer.batches) <= shards._BATCH_CHARS + len(piece)
    assert len(tokenizer.batches) > 1
    assert open_store(target).token_count == 200 * (1 << 14) + 1
