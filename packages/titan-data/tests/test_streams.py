import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_data.streams import EpochProgress, IterableStreams, SourceStreams


def texts(pieces):
    found, text = [], ""
    for piece in pieces:
        text += piece.text
        if piece.ends_document:
            found.append(text)
            text = ""
    assert not text
    return found


@given(documents=st.integers(0, 40), part=st.integers(1, 15), streams=st.integers(1, 12), epoch=st.integers(0, 3))
def test_each_document_is_in_one_stream_the_same_in_every_epoch(pieces_source, documents, part, streams, epoch):
    source = SourceStreams(pieces_source(*((str(i), True) for i in range(documents)), part=part), seed=1)
    found = [texts(source.pieces(stream, streams, epoch, EpochProgress())) for stream in range(streams)]
    assert sorted(itertools.chain(*found), key=int) == [str(i) for i in range(documents)]
    assert [sorted(texts(source.pieces(stream, streams, 7, EpochProgress()))) for stream in range(streams)] == list(
        map(sorted, found)
    )


def test_parts_are_shuffled_each_epoch_or_not_at_all(pieces_source):
    pieces = [(str(i), True) for i in range(30)]
    shuffled = SourceStreams(pieces_source(*pieces, part=1), seed=1)
    first, second = (texts(shuffled.pieces(0, 2, epoch, EpochProgress())) for epoch in range(2))
    assert first != second
    assert texts(shuffled.pieces(0, 2, 0, EpochProgress())) == first
    assert texts(SourceStreams(pieces_source(*pieces, part=1), seed=2).pieces(0, 2, 0, EpochProgress())) != first
    plain = SourceStreams(pieces_source(*pieces, part=1), seed=1, shuffle=False)
    assert texts(plain.pieces(1, 2, 5, EpochProgress())) == [str(i) for i in range(1, 30, 2)]


def test_progress_is_by_the_size_of_what_was_read(pieces_source):
    documents = [("a" * size, True) for size in (1, 4, 2, 3)]
    source = SourceStreams(pieces_source(*documents, part=1), seed=1, shuffle=False)
    progress = EpochProgress()
    assert [progress.share for _ in source.pieces(0, 1, 0, progress)] == [0.1, 0.5, 0.7, 1]
    shared = SourceStreams(pieces_source(*documents), seed=1)
    assert [progress.share for _ in shared.pieces(1, 2, 0, progress)] == [0.5, 1]


def test_progress_through_a_packed_file_is_known_at_its_end(pieces_source):
    source = pieces_source(("a" * 60, True), ("a" * 60, True), part=1)
    for part in source.parts:
        part.size_bytes = 20
    progress = EpochProgress()
    assert [progress.share for _ in SourceStreams(source, seed=1).pieces(0, 1, 0, progress)] == [0.5, 1]


def test_pieces_of_one_document_stay_together(pieces_source):
    source = SourceStreams(pieces_source(("a", False), ("b", True), ("c", True), ("d", False), ("e", True)), seed=1)
    assert texts(source.pieces(0, 2, 0, EpochProgress())) == ["ab", "de"]
    assert texts(source.pieces(1, 2, 0, EpochProgress())) == ["c"]


class Numbers:
    def __call__(self, epoch):
        return (str(epoch * 100 + i) for i in range(7))


def test_any_iterable_is_dealt_text_by_text():
    source = IterableStreams(Numbers())
    assert texts(source.pieces(1, 3, 2, EpochProgress())) == ["201", "204"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_streaming_dataset_of_hugging_face(tmp_path):
    import datasets

    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(5)))
    hub = datasets.load_dataset(
        "json", data_files=str(tmp_path / "x.jsonl"), split="train", streaming=True, cache_dir=str(tmp_path)
    )
    source = IterableStreams(lambda epoch: (row["text"] for row in hub))
    assert texts(source.pieces(0, 2, 0, EpochProgress())) == ["t0", "t2", "t4"]
