import shutil

import pytest

from titan_data.errors import DataError
from titan_data.tokenizer import rank_file
from titan_data.tokenizer_files import load_tokenizer, tokenizer_from_files


@pytest.fixture
def folder(bpe_folder, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(bpe_folder, tmp_path / "tokenizer")


def test_a_folder_and_its_file_are_the_same_tokenizer(bpe_folder):
    assert load_tokenizer(bpe_folder).hash == load_tokenizer(bpe_folder / "tokenizer.json").hash


def test_its_files_make_the_same_tokenizer_again(folder, tmp_path):
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "unrelated.bin").write_text("x")
    tokenizer = load_tokenizer(folder)
    assert set(tokenizer.files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in tokenizer.files.items():
        (copy / name).write_bytes(content)
    assert load_tokenizer(copy).hash == tokenizer.hash
    assert tokenizer_from_files(tokenizer.files, name="again").hash == tokenizer.hash
    assert load_tokenizer(copy).eos_id == tokenizer.eos_id


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.tokenizer '.*nowhere' does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json, tokenizer\.model or \*\.tiktoken"):
        load_tokenizer(tmp_path)


def test_the_formats_of_a_folder_are_looked_for_in_order(folder):
    (folder / "tokenizer.model").write_text("no ranks")
    load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="line 1: not a token in base64"):
        load_tokenizer(folder)
    (folder / "tokenizer.model").unlink()
    (folder / "a.tiktoken").write_text("no ranks")
    with pytest.raises(DataError, match="line 1: not a token in base64"):
        load_tokenizer(folder)
    (folder / "b.tiktoken").write_text("no ranks")
    with pytest.raises(DataError, match=r"holds 2 \.tiktoken files"):
        load_tokenizer(folder)


def test_the_file_of_ranks_is_the_one_that_is_no_companion():
    assert rank_file({"tokenizer_config.json": b"", "cl100k.tiktoken": b"", "tiktoken.json": b""}) == "cl100k.tiktoken"
    with pytest.raises(DataError, match="one file of ranks"):
        rank_file({"tokenizer_config.json": b""})
