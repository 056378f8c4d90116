import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from titan_data.errors import DataError
from titan_data.reading import ReadCounts
from titan_data.sources import open_corpus


@pytest.fixture
def open_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def open_source(source, format="auto", text_field="text"):
        memory = tmp_path / "memory"
        return open_corpus(str(source), format=format, text_field=text_field, memory=memory, progress=lambda _: None)

    return open_source


def documents(corpus, counts=None):
    texts, text = [], ""
    for piece in corpus.pieces(counts or ReadCounts()):
        text += piece.text
        if piece.ends_document:
            texts.append(text)
            text = ""
    return texts


def write_tree(root, files):
    for name, content in files.items():
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_a_folder_is_read_in_the_order_of_its_paths(open_source):
    write_tree("c", {"b.txt": "3", "a/z.md": "2", "a/b/c.py": "1", "lines.jsonl": '{"text": "4"}\n{"text": "5"}\n'})
    corpus = open_source("c")
    assert documents(corpus) == ["1", "2", "3", "4", "5"]
    assert corpus.size_bytes == 31
    assert corpus.describe() == "c: 4 files, 0.0 MB"


def test_hidden_and_other_files_of_a_folder_are_left_out_and_counted(open_source):
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


def test_the_format_chooses_the_files_of_a_folder(open_source):
    write_tree("c", {"a.txt": "1", "b.jsonl": '{"text": "2"}'})
    assert documents(open_source("c", "text")) == ["1"]
    assert documents(open_source("c", "jsonl")) == ["2"]


def test_a_file_named_by_itself_may_be_called_anything(open_source):
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


def test_a_glob_takes_what_it_matches_in_order(open_source):
    write_tree("c", {"a/2.log": "2", "a/1.log": "1", "b/3.log": "3", "b/4.txt": "4"})
    assert documents(open_source("c/**/*.log")) == ["1", "2", "3"]
    assert documents(open_source(Path.cwd() / "c" / "?" / "[34].*")) == ["3", "4"]


def test_a_name_with_glob_characters_that_exists_is_that_file(open_source):
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


def test_the_fingerprint_knows_where_documents_end_and_how_files_are_read(open_source):
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
        ("nowhere", {}, FileNotFoundError, r"data\.source 'nowhere' does not exist .*looked from the folder /"),
        ("c/*.nothing", {}, FileNotFoundError, r"no file matches data\.source 'c/\*\.nothing'"),
        ("empty", {}, DataError, "the folder empty holds 0 files, but none to read"),
        ("c", {"format": "jsonl"}, DataError, r"holds 1 files, but none to read: .*'jsonl' looks for \.jsonl \.ndjson"),
        ("c", {"format": "csv"}, DataError, "data.format is 'csv'; it must be"),
        ("c", {"text_field": "body"}, DataError, "data.text_field is 'body', but c has no JSONL file"),
        ("stdlib", {"format": "jsonl"}, DataError, "data.format is 'jsonl', but the standard library is text"),
    ],
)
def test_refuses_what_it_cannot_read(open_source, source, options, error, message):
    write_tree("c", {"a.txt": "1"})
    Path("empty").mkdir()
    with pytest.raises(error, match=message):
        open_source(source, **options)


def test_a_file_that_changes_while_it_is_read_is_refused(open_source):
    write_tree("c", {"a.txt": "one", "b.txt": "two"})
    corpus = open_source("c")
    write_tree("c", {"b.txt": "two and more"})
    with pytest.raises(DataError, match=r"b\.txt changed while it was being read"):
        documents(corpus)


def test_the_standard_library_is_a_corpus_of_megabytes(open_source):
    corpus = open_source("stdlib")
    paths = {file.path.relative_to(sysconfig.get_path("stdlib")).as_posix() for file in corpus.files}
    assert {"argparse.py", "asyncio/tasks.py", "json/decoder.py"} <= paths
    assert not [path for path in paths if "site-packages" in path or "/test/" in path or "_sysconfigdata" in path]
    assert 5e6 < corpus.size_bytes < 40e6
    assert [file.path for file in corpus.files] == [file.path for file in open_source("stdlib").files]
    counts = ReadCounts()
    assert sum(len(text) for text in documents(corpus, counts)) > 5e6
    assert counts.skipped_files <= 5


def test_files_of_the_standard_library_that_are_not_utf8_are_skipped_and_counted(open_source, monkeypatch):
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
    corpus = open_corpus(path, format="auto", text_field="text", memory=tmp_path, progress=lambda message: None)
    assert corpus.size_bytes == 4
