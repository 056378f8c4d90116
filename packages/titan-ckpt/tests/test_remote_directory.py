import pytest

from titan_ckpt.location import place_of
from titan_ckpt.manifest import MANIFEST_NAME
from titan_ckpt.open_directory import open_directory
from titan_ckpt.place import Place
from titan_ckpt.remote_directory import RemoteDirectory

STRANGERS = [
    "backup-step-77/x",
    "step-5.tmp/x",
    "step-9",
    "step-7/.metadata",
    "step-7/__0_0.distcp",
    "notes.unfinished",
]


def fail(message: str) -> None:
    pytest.fail(f"reported: {message}")


@pytest.fixture
def place(memory: str) -> Place:
    return place_of(memory)


@pytest.fixture
def directory(place: Place) -> RemoteDirectory:
    return RemoteDirectory(place, fail)


def save(directory: RemoteDirectory, step: int) -> Place:
    folder = directory.begin(step)
    folder.write("x", b"1")
    folder.write(MANIFEST_NAME, b"{}")
    return directory.publish(folder, step)


def test_a_folder_is_a_checkpoint_from_its_manifest_on(directory: RemoteDirectory, place: Place) -> None:
    assert directory.candidates() == []
    folder = directory.begin(5)
    folder.write("x", b"1")
    folder.write(f"files/{MANIFEST_NAME}", b"of somebody else")
    assert directory.candidates() == []
    folder.write(MANIFEST_NAME, b"{}")
    assert directory.candidates() == [place / "step-5"]
    assert directory.publish(folder, 5) == place / "step-5"
    assert "step-5.unfinished" not in place.files()


def test_a_step_saved_again_stands_beside_the_old_one_until_it_is_whole(
    directory: RemoteDirectory, place: Place
) -> None:
    save(directory, 5)
    again = directory.begin(5)
    again.write("x", b"2")
    assert again.name == "step-5.again-00000001"
    assert directory.candidates() == [place / "step-5"]
    again.write(MANIFEST_NAME, b"{}")
    assert directory.candidates() == [again, place / "step-5"]  # the later one counts, were we killed here
    directory.publish(again, 5)
    assert directory.candidates() == [again]
    assert place.folders() == [again.name]
    assert save(directory, 5).name == "step-5.again-00000002"


def test_what_a_killed_save_or_deletion_has_left_is_swept(directory: RemoteDirectory, place: Place) -> None:
    for step in (1, 2, 3):
        save(directory, step)
    directory.begin(4).write("__0_0.distcp", b"1")  # killed while writing
    place.write("step-1.unfinished", b"")  # killed while deleting, just before the manifest went
    place.write("step-2.unfinished", b"")  # and just after
    (place / "step-2").remove(MANIFEST_NAME)
    directory.sweep()
    assert set(place.files()) == {f"step-{step}/{name}" for step in (1, 3) for name in ("x", MANIFEST_NAME)}


def test_strangers_neither_break_anything_nor_go(directory: RemoteDirectory, place: Place) -> None:
    for name in STRANGERS:
        place.write(name, b"mine")
    for step in (5, 7, 9):
        save(directory, step)
    directory.sweep()
    assert {*STRANGERS} < set(place.files())
    assert all(place.read(name) == b"mine" for name in STRANGERS)
    names = [folder.name for folder in directory.candidates()]
    assert names == ["step-9.again-00000001", "step-7.again-00000001", "step-5"]


def test_an_abandoned_folder_is_gone(directory: RemoteDirectory, place: Place) -> None:
    folder = directory.begin(5)
    folder.write("x", b"1")
    directory.abandon(folder)
    assert place.files() == {}


def test_what_cannot_be_deleted_is_reported(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[str] = []
    directory = open_directory(place, reports.append)
    directory.begin(5).write("x", b"1")

    def refuse(self: Place) -> None:
        raise PermissionError(13, "denied")

    monkeypatch.setattr(type(place), "delete", refuse)
    directory.sweep()
    assert len(reports) == 1
    assert "step-5 could not be tidied up" in reports[0]
