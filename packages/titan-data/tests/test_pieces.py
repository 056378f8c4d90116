import sysconfig
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from titan_data import pieces
from titan_data.pieces import pieces_of, pieces_of_chunks
from titan_data.source import Piece

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


def test_pieces_are_bounded_and_make_up_the_document(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_CHARS", 50)
    for text in ("word " * 100, "東京\n" * 100, "x" * 1000, "\n" * 200, "", "a" * 50, "a" * 51):
        found = list(pieces_of(text))
        assert "".join(piece.text for piece in found) == text
        assert max(len(piece.text) for piece in found) <= 50
        assert [piece.ends_document for piece in found] == [False] * (len(found) - 1) + [True]


def test_a_short_document_is_one_piece_as_it_stands():
    assert list(pieces_of("one\r\n two")) == [Piece("one\r\n two", True)]
    assert list(pieces_of("")) == list(pieces_of_chunks([])) == [Piece("", True)]


@given(chunks=st.lists(st.text("ab \n", max_size=40), max_size=12))
def test_pieces_do_not_depend_on_how_the_text_arrives(chunks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_CHARS", 10)
        assert list(pieces_of_chunks(chunks)) == list(pieces_of("".join(chunks)))


@pytest.mark.parametrize("pattern", PATTERNS)
@given(text=st.text("ab1'東;. \n\r\t\u2028\xa0", min_size=3, max_size=40))
@settings(max_examples=300, suppress_health_check=[HealthCheck.filter_too_much])  # much text has no place to cut
def test_the_patterns_of_tokenizers_have_a_border_where_text_is_cut(pattern, text):
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[pattern]), "isolated")

    def words(text):
        return [word for word, _ in split.pre_tokenize_str(text)]

    end = len(text) - 1
    cut = pieces._cut(text, 0, end)
    assume(cut != end)  # there is a place to cut
    assert words(text[:cut]) + words(text[cut:]) == words(text)


def test_a_document_in_pieces_has_the_tokens_of_the_whole(monkeypatch, bpe_folder):
    monkeypatch.setattr(pieces, "PIECE_CHARS", 150)  # more than the longest stretch without a place to cut
    tokenizer = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    for text in (
        (Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_text(),
        "Lines.\n\n\n  Blank ones,\n\t tabs; 12345 67\r\nand  double  spaces, it's all.\n \n" * 40,
    ):
        found = list(pieces_of(text))
        assert len(found) > len(text) / 150
        joined = [id for piece in found for id in tokenizer.encode(piece.text).ids]
        assert joined == tokenizer.encode(text).ids
