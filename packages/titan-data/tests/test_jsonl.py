import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_data import jsonl
from titan_data.errors import DataError
from titan_data.jsonl import jsonl_parts
from titan_data.records import text_of
from titan_data.source import ReadCounts


@pytest.fixture(scope="session")
def parts_of(source_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jsonl")

    def parts_of(content, name="a.jsonl", text=text_of("text", None)):  # noqa: B008
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return jsonl_parts(source_file(path), text)

    return parts_of


def test_each_line_is_a_document(parts_of, documents):
    lines = [{"text": "one\nline"}, {"id": 7, "text": "\u2028 two 東京 🙂"}, {"text": ""}]
    body = "\n".join([json.dumps(lines[0]), "", json.dumps(lines[1], ensure_ascii=False), "  ", json.dumps(lines[2])])
    parts = parts_of(body)
    assert documents(parts) == [line["text"] for line in lines]
    assert sum(part.size_bytes for part in parts) == len(body.encode())
    assert [dict(record.fields) for record in parts[0].records()] == lines


def test_a_byte_order_mark_at_the_beginning_is_no_text(parts_of, documents):
    assert documents(parts_of('\ufeff{"text": "a"}')) == ["a"]


def test_an_empty_file_has_no_parts(parts_of):
    assert parts_of("") == []


def test_a_template_puts_fields_together(parts_of, documents):
    content = '{"q": "1 + 1?", "a": 2}\n'
    assert documents(parts_of(content, text=text_of("text", "Q: {q}\nA: {a}"))) == ["Q: 1 + 1?\nA: 2"]


@given(
    texts=st.lists(st.text("aé\n", max_size=12), max_size=20),
    blank=st.integers(0, 3),
    end=st.sampled_from(["", "\n"]),
    step=st.integers(1, 40),
)
def test_parts_hold_each_line_once_wherever_they_are_cut(parts_of, documents, texts, blank, end, step):
    body = ("\n" * (1 + blank)).join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "PART_BYTES", step)
        parts = parts_of(body)
        assert len(parts) == -(-len(body.encode()) // step)
        assert documents(parts) == texts


@given(
    before=st.lists(st.sampled_from(['{"text": "a"}', "", '{"text": "long enough"}']), max_size=9),
    step=st.integers(1, 30),
)
def test_a_bad_line_has_its_number_in_the_file_in_whatever_part_it_stands(parts_of, documents, before, step):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "PART_BYTES", step)
        patch.setattr(jsonl, "_READ_BYTES", 5)
        with pytest.raises(DataError, match=rf"a\.jsonl, line {len(before) + 1}: not JSON"):
            documents(parts_of("\n".join([*before, "bad", '{"text": "after"}'])))


def test_a_compressed_file_is_one_part(parts_of, documents, monkeypatch):
    monkeypatch.setattr(jsonl, "PART_BYTES", 10)
    lines = "".join(json.dumps({"text": str(i)}) + "\n" for i in range(100))
    parts = parts_of(gzip.compress(lines.encode()), "a.jsonl.gz")
    assert len(parts) == 1
    assert documents(parts) == [str(i) for i in range(100)]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"text": "cut sho', r"line 3: not JSON \(Unterminated string.*: column 10\)"),
        ("hello", r"line 3: not JSON \(Expecting value: column 1\)"),
        ("[" * 100_000, r"line 3: JSON that Python does not read \(maximum recursion depth"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", r"line 3: JSON that Python does not read \(Exceeds the limit"),
        ('["text"]', r"line 3: a JSON list, not an object"),
        ('{"body": "x", "id": 1}', r"line 3: no field 'text'; it has 'body', 'id'\. .*data\.text_field"),
        ("{}", "line 3: no field 'text'; it has no fields"),
        ('{"text": 5}', "line 3: field 'text' holds a value of type int, not text"),
        ('{"text": null}', "line 3: field 'text' holds null, not text"),
        ('{"text": "\\ud83d alone"}', "line 3: holds half of a surrogate pair"),
        (b'{"text": "\xe9"}', "line 3: byte 11 of the line \\(0xe9\\) is not UTF-8"),
    ],
)
def test_a_bad_line_is_refused_with_its_place(parts_of, bad, message):
    bad = bad if isinstance(bad, bytes) else bad.encode()
    parts = parts_of(b'{"text": "one"}\n\n' + bad + b"\n")
    with pytest.raises(DataError, match=r"a\.jsonl, " + message):
        list(parts[0].pieces(ReadCounts()))
