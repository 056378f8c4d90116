import pytest

from titan_data import text_files
from titan_data.errors import DataError
from titan_data.source import Piece, ReadCounts
from titan_data.text_files import TextFile


@pytest.fixture
def text_file(tmp_path, source_file):
    def text_file(content, **options):
        path = tmp_path / "latin.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return TextFile(source_file(path), **options)

    return text_file


def test_a_text_file_is_one_document_as_it_stands(text_file):
    part = text_file("one\r\n\n two\ttabs \u2028 東京\n")
    assert list(part.pieces(ReadCounts())) == [Piece("one\r\n\n two\ttabs \u2028 東京\n", True)]
    assert part.size_bytes == 27


def test_a_byte_order_mark_at_the_beginning_is_no_text(text_file):
    assert list(text_file("\ufeffa\ufeffb").pieces(ReadCounts())) == [Piece("a\ufeffb", True)]


def test_an_empty_file_is_an_empty_document(text_file):
    assert list(text_file("").pieces(ReadCounts())) == [Piece("", True)]


def test_a_file_that_changes_while_it_is_read_is_refused(text_file, tmp_path):
    part = text_file("one")
    (tmp_path / "latin.txt").write_text("one and more")
    with pytest.raises(DataError, match=r"latin\.txt changed while it was being read"):
        list(part.pieces(ReadCounts()))


def test_a_file_may_be_skipped_if_it_is_not_utf8_and_is_counted(text_file):
    counts = ReadCounts()
    assert list(text_file(b"\xe9", skip_undecodable=True).pieces(counts)) == []
    assert list(text_file("é", skip_undecodable=True).pieces(counts)) == [Piece("é", True)]
    assert counts.skipped_files == 1


@pytest.mark.parametrize(
    ("content", "line", "byte"),
    [
        (b"\xff", 1, 1),
        (b"fine\nfine too\nbut \xe9t\xe9\n", 3, 5),
        ("東京\n".encode() * 5 + b"\xe6\x9d", 6, 1),  # cut short in mid-character
        (b"\xef\xbb\xbfabc\xffd", 1, 7),  # after a byte order mark
        (b"123456\xe6\x9d", 1, 7),  # cut short where a chunk ends
        (b"123456\xe6xyz", 1, 7),  # a chunk ends within a bad character
        (b"12\n456\xe6xyz", 2, 4),
        (b"12\n4567\n9\n123\xff", 4, 4),  # in a later chunk than the line's beginning
    ],
)
def test_text_that_is_not_utf8_is_refused_with_its_place(text_file, monkeypatch, content, line, byte):
    monkeypatch.setattr(text_files, "_CHUNK_BYTES", 7)
    with pytest.raises(DataError, match=rf"latin\.txt, line {line}: byte {byte} of the line \(0x"):
        list(text_file(content).pieces(ReadCounts()))
