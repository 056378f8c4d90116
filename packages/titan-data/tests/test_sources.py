import gzip
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard

from titan_data.config import DataConfig
from titan_data.errors import DataError
from titan_data.source import ReadCounts, source_bytes
from titan_data.sources import open_source as open_configured


@pytest.fixture
def open_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def open_source(source, format="auto", **options):
        config = DataConfig(source=str(source), format=format, **options)
        return open_configured(config, cache=tmp_path / "cache", progress=lambda _: None)

    return open_source


@pytest.fixture
def documents(documents):
    return lambda source, counts=None: documents(source.parts, counts)


def write_tree(root, files):
    for name, content in files.items():
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_a_folder_is_read_in_the_order_of_its_paths(open_source, documents):
    write_tree("c", {"b.txt": "3", "a/z.md": "2", "a/b/c.py": "1", "lines.jsonl": '{"text": "4"}\n{"text": "5"}\n'})
    corpus = open_source("c")
    assert documents(corpus) == ["1", "2", "3", "4", "5"]
    assert source_bytes(corpus) == 31
    assert corpus.describe() == "c: 4 files, 0.0 MB"


def test_hidden_and_other_files_of_a_folder_are_left_out_and_counted(open_source, documents):
    write_tree(
        "c",
        {
            "a.txt": "1",
            "B.TXT": "0",
            "C.JSONL": '{"text": "-"}',
            ".git/b.txt": "x",
            ".c.txt": "x",
            "d.png": b"\xff",
            "e": "x",
        },
    )
    corpus = open_source("c")
    assert documents(corpus) == ["0", "-", "1"]
    assert "(2 other files ignored)" in corpus.describe()


def test_the_format_chooses_the_files_of_a_folder(open_source, documents):
    write_tree("c", {"a.txt": "1", "b.jsonl": '{"text": "2"}'})
    assert documents(open_source("c", "text")) == ["1"]
    assert documents(open_source("c", "jsonl")) == ["2"]


def test_a_file_named_by_itself_may_be_called_anything(open_source, documents):
    write_tree(
        ".", {"notes": "text", "data.log": '{"text": "x"}', "data.json": '{"text": "x"}', "l.ndjson": '{"text":"y"}'}
    )
    assert documents(open_source("notes")) == ["text"]
    assert documents(open_source("data.log")) == ['{"text": "x"}']
    assert documents(open_source("data.log", "jsonl")) == ["x"]
    assert documents(open_source("l.ndjson")) == ["y"]
    assert documents(open_source("l.ndjson", "text")) == ['{"text":"y"}']
    assert documents(open_source("data.json", "jsonl")) == ["x"]
    with pytest.raises(DataError, match=r"data\.json: a \.json file may be .* Set data\.format"):
        open_source("data.json")


def test_a_glob_takes_what_it_matches_in_order(open_source, documents):
    write_tree("c", {"a/2.log": "2", "a/1.log": "1", "b/3.log": "3", "b/4.txt": "4"})
    assert documents(open_source("c/**/*.log")) == ["1", "2", "3"]
    assert documents(open_source(Path.cwd() / "c" / "?" / "[34].*")) == ["3", "4"]


def test_packed_files_and_tables_are_found_by_their_suffix(open_source, documents):
    write_tree("c", {"a.txt.gz": gzip.compress(b"1"), "b.jsonl.zst": zstandard.compress(b'{"text": "2"}')})
    pyarrow.parquet.write_table(pyarrow.table({"text": ["3", "4"]}), "c/c.parquet")
    pyarrow.feather.write_feather(pyarrow.table({"text": ["5"]}), "c/d.arrow")
    assert documents(open_source("c")) == ["1", "2", "3", "4", "5"]
    assert documents(open_source("c", "parquet")) == ["3", "4"]
    assert documents(open_source("c", "arrow")) == ["5"]
    assert documents(open_source("c", "jsonl")) == ["2"]
    shutil.copy("c/c.parquet", "c/e.parquet.gz")
    with pytest.raises(DataError, match=r"e\.parquet\.gz: parquet files are compressed inside"):
        open_source("c")


def test_the_test_set_of_torchtitan_is_known_by_name(open_source, documents):
    write_tree(
        "tests/assets/c4_test", {"data.json": '{"text": "1", "url": "x"}\n{"text": "2"}\n', "README.md": "about"}
    )
    assert documents(open_source("c4_test")) == ["1", "2"]
    assert open_source("c4_test").describe() == "c4_test: 1 files, 0.0 MB (1 other files ignored)"
    assert open_source("tests/assets/c4_test", "jsonl").fingerprint == open_source("c4_test").fingerprint
    with pytest.raises(DataError, match=r"data\.format is 'text', but c4_test is jsonl"):
        open_source("c4_test", "text")


def test_c4_is_known_by_name(open_source, monkeypatch):
    asked = []
    monkeypatch.setattr("titan_data.sources.find_remote", lambda source, wanted: asked.append(source) or ([], 0))
    open_source("c4")
    assert asked == ["hf://datasets/allenai/c4/en/c4-train.*.json.gz"]


def test_a_template_is_part_of_the_fingerprint(open_source, documents):
    write_tree(".", {"a.jsonl": '{"q": "1 + 1?", "a": "2"}'})
    sources = [open_source("a.jsonl", template=template) for template in ("{q} {a}", "{a} {q}", "{q}\n{a}")]
    assert [documents(source) for source in sources] == [["1 + 1? 2"], ["2 1 + 1?"], ["1 + 1?\n2"]]
    assert len({source.fingerprint for source in sources}) == 3


def test_empty_files_are_counted(open_source, documents):
    write_tree("c", {"a.txt": "", "b.jsonl": "", "c.txt": "1"})
    assert documents(open_source("c")) == ["", "1"]
    assert "3 files (2 of them empty)" in open_source("c").describe()


def test_a_name_with_glob_characters_that_exists_is_that_file(open_source, documents):
    write_tree(".", {"a[1].txt": "brackets"})
    assert documents(open_source("a[1].txt")) == ["brackets"]


def test_the_fingerprint_is_of_the_content_not_of_the_place(open_source):
    write_tree("c", {"a.txt": "1", "b.txt": "2"})
    fingerprint = open_source("c").fingerprint
    shutil.copytree("c", "elsewhere/d")
    assert open_source("elsewhere/d").fingerprint == fingerprint
    assert open_source("elsewhere/*/*.txt").fingerprint == fingerprint
    Path("c/b.txt").rename("c/c.txt")
    assert open_source("c").fingerprint == fingerprint


def test_the_fingerprint_changes_with_the_text(open_source):
    write_tree("c", {"a.txt": "1", "b.txt": "2"})
    seen = [open_source("c").fingerprint]
    Path("c/a.txt").rename("c/z.txt")  # now it is read last
    seen.append(open_source("c").fingerprint)
    write_tree("c", {"b.txt": "2!"})
    seen.append(open_source("c").fingerprint)
    write_tree("c", {"new.txt": "3"})
    seen.append(open_source("c").fingerprint)
    assert len(set(seen)) == 4


def test_the_fingerprint_knows_where_documents_end_and_how_files_are_read(open_source, documents):
    write_tree("one", {"a.txt": "12"})
    write_tree("two", {"a.txt": "1", "b.txt": "2"})
    line = json.dumps({"text": "x", "body": "y"})
    write_tree(".", {"a.jsonl": line, "same-as.txt": line})
    corpora = [
        open_source("one"),
        open_source("two"),
        open_source("a.jsonl"),
        open_source("same-as.txt"),
        open_source("a.jsonl", text_field="body"),
    ]
    assert len({corpus.fingerprint for corpus in corpora}) == 5
    assert documents(corpora[-1]) == ["y"]


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("nowhere", {}, FileNotFoundError, r"there is no corpus 'nowhere' .*looked from the folder /"),
        ("c/*.nothing", {}, FileNotFoundError, r"no file matches 'c/\*\.nothing'"),
        ("empty", {}, DataError, "the folder empty holds 0 files, but none to read"),
        ("c", {"format": "jsonl"}, DataError, r"holds 1 files, but none to read: .*looks for \.json \.jsonl \.ndjson"),
        ("c", {"format": "csv"}, DataError, "data.format is 'csv'; it must be"),
        ("c", {"text_field": "body"}, DataError, "data.text_field is set, but c has only text files"),
        ("c", {"template": "{body}"}, DataError, "data.template is set, but c has only text files"),
        ("c", {"template": "{x}", "text_field": "y"}, DataError, "two ways to say where the text is"),
        ("stdlib", {"format": "jsonl"}, DataError, "data.format is 'jsonl', but the standard library is text"),
    ],
)
def test_refuses_what_it_cannot_read(open_source, source, options, error, message):
    write_tree("c", {"a.txt": "1"})
    Path("empty").mkdir()
    with pytest.raises(error, match=message):
        open_source(source, **options)


def test_a_file_that_changes_while_it_is_read_is_refused(open_source, documents):
    write_tree("c", {"a.txt": "one", "b.txt": "two"})
    corpus = open_source("c")
    write_tree("c", {"b.txt": "two and more"})
    with pytest.raises(DataError, match=r"b\.txt changed while it was being read"):
        documents(corpus)


def test_the_standard_library_is_a_corpus_of_megabytes(open_source, documents):
    corpus = open_source("stdlib")
    paths = {Path(file.name).relative_to(sysconfig.get_path("stdlib")).as_posix() for file in corpus.files}
    assert {"argparse.py", "asyncio/tasks.py", "json/decoder.py"} <= paths
    assert not [path for path in paths if "site-packages" in path or "/test/" in path or "_sysconfigdata" in path]
    assert 5e6 < source_bytes(corpus) < 40e6
    assert [file.name for file in corpus.files] == [file.name for file in open_source("stdlib").files]
    counts = ReadCounts()
    assert sum(len(text) for text in documents(corpus, counts)) > 5e6
    assert counts.skipped_files <= 5


def test_files_of_the_standard_library_that_are_not_utf8_are_skipped_and_counted(open_source, documents, monkeypatch):
    write_tree("lib", {"a.py": "a = 1", "b.py": b"# \xe9", "test/c.py": "x", "site-packages/d.py": "x", "e.txt": "x"})
    write_tree("lib", {"config-3.11-x86_64/f.py": "x", "_sysconfigdata__linux.py": "x", "g/h.py": "h = 2"})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(Path("lib").resolve()))
    counts = ReadCounts()
    assert documents(open_source("stdlib"), counts) == ["a = 1", "h = 2"]
    assert counts.skipped_files == 1


def test_a_python_without_sources_is_an_error(open_source, monkeypatch):
    Path("lib").mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(Path("lib").resolve()))
    with pytest.raises(DataError, match=r"no readable source text of its standard library .*data\.source"):
        open_source("stdlib")


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such file names")
def test_a_file_name_that_is_not_utf8_is_only_a_name(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.txt")
    Path(path).write_text("text")
    config = DataConfig(source=path)
    assert source_bytes(open_configured(config, cache=tmp_path / "cache", progress=lambda message: None)) == 4
