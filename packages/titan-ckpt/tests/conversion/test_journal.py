from titan_ckpt.conversion.journal import FOLDER, Journal, Written
from titan_ckpt.formats.streams import create
from titan_ckpt.location import place_of
from titan_ckpt.place import Place


def written(place: Place, name: str, content: bytes) -> Written:
    with create(place, name) as file:
        file.write(content)
    return Written(file.record, [[1, 2], [3, 4]])


def test_what_was_noted_is_found_as_long_as_it_is_whole(anywhere: str) -> None:
    place = place_of(anywhere)
    journal = Journal(place, {"source": "a"})
    assert not journal.exists()
    journal.begin()
    noted = written(place, "x.distcp", b"123")
    assert journal.finished("x.distcp") is None  # written, but nobody has said so
    journal.note("x.distcp", noted)
    assert Journal(place, {"source": "a"}).finished("x.distcp") == noted
    for content in (b"124", b"12"):
        written(place, "x.distcp", content)
        assert journal.finished("x.distcp") is None
    written(place, "x.distcp", b"123")
    written(place / FOLDER, "x.distcp.json", b'{"record"')  # killed while it was being noted
    assert journal.finished("x.distcp") is None


def test_another_plan_is_another_journal(anywhere: str) -> None:
    place = place_of(anywhere)
    Journal(place, {"source": "a"}).begin()
    assert Journal(place, {"source": "a"}).is_ours()
    assert Journal(place, {"source": "b"}).exists()
    assert not Journal(place, {"source": "b"}).is_ours()
    Journal(place, {}).remove()
    assert place.files() == {}
