import dataclasses
import re
import sqlite3
from pathlib import Path

import pytest

from titan_data.config import DataConfig
from titan_data.dataset import open_dataset
from titan_data.errors import DataError, NotFoundError
from titan_data.python_source import is_python_name

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The source that the README shows, in a module that can be imported, with two letters to read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    (code,) = [block for block in blocks if "class Letters" in block]
    (tmp_path / "my_sources.py").write_text(code)
    with sqlite3.connect(tmp_path / "letters.db") as database:
        database.execute("create table letters (number integer, text text)")
        database.executemany("insert into letters values (?, ?)", [(2, "With love, B."), (1, "Dear A,")])
    database.close()
    return DataConfig(source="my_sources:Letters", vocab_size=270, cache_dir=str(tmp_path / "cache"))


def test_the_readmes_source_is_read_by_its_name(config):
    dataset = open_dataset(config)
    texts = [dataset.tokenizer.decode(dataset.store[i][:-1].tolist()) for i in range(dataset.document_count)]
    assert texts == ["Dear A,", "With love, B."]
    assert "letters.db, a table of letters" in dataset.describe()


def test_its_length_is_what_the_readme_says():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    (code,) = [block for block in blocks if "class Letters" in block]
    assert len(code[code.index("class") :].strip().splitlines()) <= 16


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("no_such_module:Letters", NotFoundError, "no_such_module.*add its folder to PYTHONPATH"),
        ("my_sources:Leters", NotFoundError, "Leters.*cannot be imported"),
        ("my_sources:Piece", DataError, "failed when it was called"),
        ("pathlib:Path", DataError, "no source: it has no fingerprint, describe"),
    ],
)
def test_what_is_none_is_refused(config, source, error, message):
    with pytest.raises(error, match=message):
        open_dataset(dataclasses.replace(config, source=source))


def test_options_for_files_have_no_effect_on_it(config):
    with pytest.raises(DataError, match=r"data\.text_field and data\.template are for files"):
        open_dataset(dataclasses.replace(config, text_field="body"))


def test_files_and_urls_are_no_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_python_name("a.b_c:D")
    assert not any(map(is_python_name, ["corpus", "a/b:c", "s3://a", "c:/d", "hf:OWNER/NAME", "a:b:c"]))
    Path("notes:old").write_text("x")
    assert not is_python_name("notes:old")
