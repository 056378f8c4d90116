import shutil
from pathlib import Path

import pytest

from titan_ckpt.errors import CheckpointError
from titan_ckpt.local_directory import LocalDirectory
from titan_ckpt.local_place import LocalPlace
from titan_ckpt.manifest import MANIFEST_NAME, Manifest
from titan_ckpt.open_directory import candidates

STRANGERS = ["backup-step-77", "step-5.tmp", "step-abc", "step-", "xstep-3", "step-3x", "step-4.tmp-XYZ", "step--1"]


def make(directory: Path, name: str, step: int = 0) -> Path:
    """A folder that looks like a checkpoint with no files."""
    manifest = Manifest(step=step, world_size=1, state=(), per_rank=(), meta={}, versions={}, files={})
    (directory / name).mkdir(parents=True)
    (directory / name / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return directory / name


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def fail(message: str) -> None:
    pytest.fail(f"reported: {message}")


def found(directory: Path) -> list[str]:
    return [place.name for place in candidates(directory)]


def open_quiet(directory: Path) -> LocalDirectory:
    return LocalDirectory(LocalPlace(directory), fail)


def tidy(directory: Path, keep_latest: int, published: int, damaged: tuple[str, ...] = ()) -> None:
    open_quiet(directory).retire(keep_latest=keep_latest, published=published, damaged=damaged)


def test_candidates_are_exactly_the_step_folders_newest_first(tmp_path: Path) -> None:
    for name in [*STRANGERS, "step-9", "step-10", "step-100", "step-7.tmp-01234567", "step-8.del-01234567"]:
        make(tmp_path, name)
    (tmp_path / "step-11").write_text("a file")
    assert found(tmp_path) == ["step-100", "step-10", "step-9"]
    assert found(tmp_path / "absent") == []


def test_a_folder_being_replaced_counts_until_its_replacement_is_there(tmp_path: Path) -> None:
    make(tmp_path, "step-1")
    make(tmp_path, "step-2.old-0123abcd")
    assert found(tmp_path) == ["step-2.old-0123abcd", "step-1"]
    make(tmp_path, "step-2")
    assert found(tmp_path) == ["step-2", "step-1"]


def test_a_later_attempt_that_was_copied_from_an_object_store_counts_until_the_step_is_saved_anew(
    tmp_path: Path,
) -> None:
    for name in ("step-1", "step-2", "step-2.again-00000001"):
        make(tmp_path, name)
    assert found(tmp_path) == ["step-2.again-00000001", "step-2", "step-1"]
    directory = open_quiet(tmp_path)
    directory.publish(directory.begin(2), 2)
    assert names(tmp_path) == {"step-1", "step-2"}


def test_sweeping_removes_our_leftovers_and_nothing_else(tmp_path: Path) -> None:
    for name in [*STRANGERS, "step-1"]:
        make(tmp_path, name)
    (tmp_path / "step-9.tmp-00000000").write_text("a file")
    kept = names(tmp_path)
    for name in [
        "step-1.old-0123abcd",
        "step-2.tmp-0123abcd",
        "step-3.del-0123abcd",
        "step-1.old-0123abcd.del-76543210",
    ]:
        make(tmp_path, name)
    open_quiet(tmp_path).sweep()
    assert names(tmp_path) == kept


def test_sweeping_gives_a_half_replaced_folder_its_name_back(tmp_path: Path) -> None:
    make(tmp_path, "step-2.old-0123abcd", step=2)
    open_quiet(tmp_path).sweep()
    assert names(tmp_path) == {"step-2"}


def test_what_cannot_be_tidied_up_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "step-2.del-0123abcd")

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    reports: list[str] = []
    LocalDirectory(LocalPlace(tmp_path), reports.append).sweep()
    assert len(reports) == 1
    assert "step-2.del-0123abcd" in reports[0]


def test_beginning_makes_a_scratch_folder_and_refuses_a_stranger_in_the_way(tmp_path: Path) -> None:
    final = tmp_path / "a" / "b" / "step-9"
    directory = open_quiet(final.parent)
    temporary = directory.begin(9)
    assert temporary.exists()
    assert temporary.name.startswith("step-9.tmp-")
    final.write_text("mine")
    with pytest.raises(CheckpointError, match="step-9 is in the way"):
        directory.begin(9)
    assert names(final.parent) == {"step-9"}


def test_retiring_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10, 20):
        make(tmp_path, f"step-{step}", step)
    tidy(tmp_path, keep_latest=0, published=20)
    assert len(names(tmp_path)) == 4
    tidy(tmp_path, keep_latest=3, published=20)
    assert names(tmp_path) == {"step-2", "step-10", "step-20"}
    tidy(tmp_path, keep_latest=1, published=20)
    assert names(tmp_path) == {"step-20"}


def test_damaged_and_later_ones_neither_count_nor_go(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5, 30):
        make(tmp_path, f"step-{step}", step)
    (tmp_path / "step-4" / MANIFEST_NAME).unlink()
    tidy(tmp_path, keep_latest=2, published=5, damaged=("step-3",))
    assert names(tmp_path) == {"step-2", "step-3", "step-4", "step-5", "step-30"}
