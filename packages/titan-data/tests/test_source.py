"""What anybody's source may get wrong."""

import pytest

from titan_data.errors import DataError
from titan_data.source import Piece, ReadCounts, all_pieces, read_part, read_records


class Mine:
    """A part that yields what it is given, and raises it if it is an error."""

    size_bytes = 1

    def __init__(self, *items):
        self.items = items

    def pieces(self, counts):
        for item in self.items:
            if isinstance(item, Exception):
                raise item
            yield item

    records = lambda self: self.pieces(None)  # noqa: E731
    parts = property(lambda self: [self])


def test_pieces_come_as_they_are():
    pieces = [Piece("a", False), Piece("b", True), Piece("", True)]
    assert list(read_part(Mine(*pieces), ReadCounts())) == list(all_pieces(Mine(*pieces))) == pieces
    assert list(read_part(Mine(), ReadCounts())) == []


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            "text",
            r"the source .*test_source:Mine yields a str, and not titan_data\.source\.Piece\(text, ends_document\)",
        ),
        (("text", True), "yields a tuple, and not"),
        (Piece(b"text", True), "yields a Piece of bytes, and not"),
        (Piece("text", False), "the source .*test_source:Mine ends within a document"),
        (ConnectionResetError("by peer"), r"test_source:Mine cannot be read \(ConnectionResetError: by peer\)"),
        (DataError("line 3"), "^line 3$"),
    ],
)
def test_what_a_source_may_get_wrong_is_refused_by_its_name(item, message):
    with pytest.raises(DataError, match=message):
        list(read_part(Mine(Piece("a", True), item), ReadCounts()))


def test_records_that_cannot_be_read_are_the_sources():
    assert list(read_records(Mine(1, 2))) == [1, 2]
    with pytest.raises(DataError, match=r"test_source:Mine cannot be read \(OSError: gone\)"):
        list(read_records(Mine(OSError("gone"))))
