import json
import sysconfig
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from titan_data import reading
from titan_data.errors import DataError
from titan_data.reading import Piece, ReadCounts, is_utf8, read_jsonl, read_text

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": LLAMA3,
    "qwen": LLAMA3.replace("{1,3}", ""),
    "cl100k": LLAMA3.replace(r"|\s+(?!\S)", r"|\s+$|\s+(?!\S)"),
}


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(reading, "PIECE_CHARS", 50)
    monkeypatch.setattr(reading, "_CHUNK_BYTES", 7)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_text_file_is_one_document_as_it_stands(tmp_path):
    counts = ReadCounts()
    path = write(tmp_path / "a.txt", "one\r\n\n two\ttabs \u2028 東京\n")
    assert list(read_text(path, counts)) == [Piece("one\r\n\n two\ttabs \u2028 東京\n", True)]
    assert counts.bytes == path.stat().st_size


def test_a_byte_order_mark_at_the_beginning_is_no_text(tmp_path):
    assert list(read_text(write(tmp_path / "a.txt", "\ufeffa\ufeffb"), ReadCounts())) == [Piece("a\ufeffb", True)]
    assert list(read_jsonl(write(tmp_path / "a.jsonl", '\ufeff{"text": "a"}'), "text", ReadCounts())) == [
        Piece("a", True)
    ]


def test_an_empty_file_is_an_empty_document(tmp_path):
    assert list(read_text(write(tmp_path / "a.txt", ""), ReadCounts())) == [Piece("", True)]


@pytest.mark.usefixtures("small_pieces")
def test_pieces_are_bounded_and_make_up_the_document(tmp_path):
    for text in ("word " * 100, "東京\n" * 100, "x" * 1000, "\n" * 200, "", "a" * 50, "a" * 51):
        pieces = list(read_text(write(tmp_path / "a.txt", text), ReadCounts()))
        assert "".join(piece.text for piece in pieces) == text
        assert max(len(piece.text) for piece in pieces) <= 50
        assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@given(chunks=st.lists(st.text("ab \n", max_size=40), max_size=12))
def test_pieces_do_not_depend_on_how_the_text_arrives(chunks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PIECE_CHARS", 10)
        assert list(reading._pieces(chunks)) == list(reading._pieces(["".join(chunks)]))


@pytest.mark.parametrize("pattern", PATTERNS)
@given(text=st.text("ab1'東;. \n\r\t\u2028\xa0", min_size=3, max_size=40))
@settings(max_examples=300, suppress_health_check=[HealthCheck.filter_too_much])  # much text has no place to cut
def test_the_patterns_of_tokenizers_have_a_border_where_text_is_cut(pattern, text):
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[pattern]), "isolated")

    def words(text):
        return [word for word, _ in split.pre_tokenize_str(text)]

    end = len(text) - 1
    cut = reading._cut(text, 0, end)
    assume(cut != end)  # there is a place to cut
    assert words(text[:cut]) + words(text[cut:]) == words(text)


def test_a_document_in_pieces_has_the_tokens_of_the_whole(tmp_path, monkeypatch, bpe_folder):
    monkeypatch.setattr(reading, "PIECE_CHARS", 150)  # more than the longest stretch without a place to cut
    tokenizer = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    for text in (
        (Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_text(),
        "Lines.\n\n\n  Blank ones,\n\t tabs; 12345 67\r\nand  double  spaces, it's all.\n \n" * 40,
    ):
        pieces = list(read_text(write(tmp_path / "a.txt", text), ReadCounts()))
        assert len(pieces) > len(text) / 150
        joined = [id for piece in pieces for id in tokenizer.encode(piece.text).ids]
        assert joined == tokenizer.encode(text).ids


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("content", "line", "offset"),
    [
        (b"\xff", 1, 0),
        (b"fine\nfine too\nbut \xe9t\xe9\n", 3, 18),
        ("東京\n".encode() * 5 + b"\xe6\x9d", 6, 35),  # cut short in mid-character
        (b"\xef\xbb\xbfabc\xffd", 1, 6),  # after a byte order mark
        (b"123456\xe6\x9d", 1, 6),  # cut short where a chunk ends
        (b"123456\xe6xyz", 1, 6),  # a chunk ends within a bad character
    ],
)
def test_text_that_is_not_utf8_is_refused_with_its_place(tmp_path, content, line, offset):
    path = write(tmp_path / "latin.txt", content)
    with pytest.raises(DataError, match=rf"latin\.txt, line {line}: byte {offset} \(0x"):
        list(read_text(path, ReadCounts()))
    assert not is_utf8(path)
    assert is_utf8(write(tmp_path / "fine.txt", "東京"))


def test_each_line_of_jsonl_is_a_document(tmp_path):
    lines = [{"text": "one\nline"}, {"id": 7, "text": "\u2028 two 東京 🙂"}, {"text": ""}]
    body = "\n".join([json.dumps(lines[0]), "", json.dumps(lines[1], ensure_ascii=False), "  ", json.dumps(lines[2])])
    path = write(tmp_path / "a.jsonl", body)
    counts = ReadCounts()
    assert list(read_jsonl(path, "text", counts)) == [Piece(line["text"], True) for line in lines]
    assert counts.bytes == path.stat().st_size


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"text": "cut sho', r"line 3: not JSON \(Unterminated string.* at column 10\)"),
        ("hello", r"line 3: not JSON \(Expecting value at column 1\)"),
        ("[" * 100_000, r"line 3: JSON that Python does not read \(maximum recursion depth"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", r"line 3: JSON that Python does not read \(Exceeds the limit"),
        ('["text"]', r"line 3: a JSON list, not an object with a field 'text'"),
        ('{"body": "x", "id": 1}', r"line 3: no field 'text'; the line has 'body', 'id'\. .*data\.text_field"),
        ("{}", "line 3: no field 'text'; the line has no fields"),
        ('{"text": 5}', "line 3: field 'text' holds a JSON int, not text"),
        ('{"text": null}', "line 3: field 'text' holds a JSON NoneType, not text"),
        ('{"text": "\\ud83d alone"}', "line 3: field 'text' holds half of a surrogate pair"),
        (b'{"text": "\xe9"}', "line 3: byte 10 of the line is not UTF-8"),
    ],
)
def test_a_bad_line_of_jsonl_is_refused_with_its_place(tmp_path, bad, message):
    bad = bad if isinstance(bad, bytes) else bad.encode()
    path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n\n' + bad + b"\n")
    with pytest.raises(DataError, match=r"a\.jsonl, " + message):
        list(read_jsonl(path, "text", ReadCounts()))
