import dataclasses
import hashlib
import json

import pytest

from titan_data.cache import DamagedError
from titan_data.errors import DataError
from titan_data.manifest import is_token_folder, read_manifest, write_manifest, write_whole
from titan_data.tokenizing import tokenize_source

FILES = ["shard-00000.tokens.bin", "documents.bin", "tokenizer/words.txt"]


@pytest.fixture
def folder(tmp_path, pieces_source, words):
    tokenize_source(tmp_path, pieces_source(("1 2 3", True), ("4 5", True)), words())
    return tmp_path


def test_says_what_the_folder_holds(folder):
    manifest = read_manifest(folder)
    assert (manifest.tokens, manifest.documents, manifest.empty_documents, manifest.skipped_files) == (7, 2, 0, 0)
    assert [file.name for file in manifest.files] == FILES
    for file in manifest.files:
        content = (folder / file.name).read_bytes()
        assert (file.size_bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert (manifest.tokenizer.vocab_size, manifest.tokenizer.eos_id, manifest.tokenizer.bos_id) == (100, 7, None)
    assert is_token_folder(folder)
    assert not is_token_folder(folder / "tokenizer")


def test_a_folder_that_is_not_finished_is_named(tmp_path, pieces_source, words, monkeypatch):
    monkeypatch.setattr("titan_data.tokenizing.write_manifest", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tokenize_source(tmp_path, pieces_source(("1 2 3", True)), words())
    with pytest.raises(DataError, match=r"are not finished\. Run the same titan-tokenize again"):
        is_token_folder(tmp_path)


def test_what_is_written_is_read(folder):
    manifest = dataclasses.replace(read_manifest(folder), source="elsewhere")
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    record = write_whole(tmp_path / "a", b"old")
    assert (record.name, record.size_bytes, record.sha256) == ("a", 3, hashlib.sha256(b"old").hexdigest())
    monkeypatch.setattr("os.fsync", lambda file: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_whole(tmp_path / "a", b"newer")
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", ["shorter", "longer", "missing"])
def test_files_of_another_length_are_damaged(folder, name, change):
    file = folder / name
    content = file.read_bytes()
    if change == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if change == "shorter" else content + b"\0")
    with pytest.raises(DamagedError, match=name):
        read_manifest(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 2}'])
def test_a_manifest_that_is_not_one_is_damaged(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(DamagedError, match=r"manifest\.json"):
        read_manifest(folder)


def test_another_format_is_not_read(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 0}))
    with pytest.raises(DamagedError, match="format 0 instead of 2"):
        read_manifest(folder)


def test_a_missing_folder_is_not_damaged_but_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_manifest(tmp_path / "nowhere")
