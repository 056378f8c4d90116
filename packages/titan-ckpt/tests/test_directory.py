from typing import Any

import pytest

from titan_ckpt.directory import attempt_of, is_checkpoint, step_name, step_of
from titan_ckpt.local_directory import LocalDirectory
from titan_ckpt.location import place_of
from titan_ckpt.manifest import MANIFEST_NAME, Manifest
from titan_ckpt.open_directory import candidates, open_directory
from titan_ckpt.place import Place
from titan_ckpt.remote_directory import RemoteDirectory


def fail(message: str) -> None:
    pytest.fail(f"reported: {message}")


def make(folder: Place, step: int, *, permanent: bool = False) -> None:
    """A checkpoint with no files."""
    described: dict[str, Any] = {"state": (), "per_rank": (), "meta": {}, "versions": {}, "files": {}}
    folder.write(MANIFEST_NAME, Manifest(step=step, world_size=1, permanent=permanent, **described).to_bytes())


@pytest.mark.parametrize(
    ("name", "step"),
    [("step-0", 0), ("step-12", 12), ("step-12.again-0000000a", 12), ("step-3.old-0123abcd", 3)]
    + [
        (name, None)
        for name in ("step-", "backup-step-7", "step-5.tmp", "step-7.again-1", "step--1", "step-3.tmp-0123abcd")
    ],
)
def test_a_step_is_read_from_our_names_only(name: str, step: int | None) -> None:
    assert step_of(name) == step


def test_names_and_attempts_go_together() -> None:
    assert [step_name(5), step_name(5, 10)] == ["step-5", "step-5.again-0000000a"]
    assert [attempt_of(step_name(5)), attempt_of(step_name(5, 10))] == [(5, 0), (5, 10)]
    assert attempt_of("step-5.old-0123abcd") is None


def test_the_place_decides_how_checkpoints_appear() -> None:
    assert isinstance(open_directory("runs"), LocalDirectory)
    assert isinstance(open_directory("s3://bucket/runs"), RemoteDirectory)


def test_retiring_is_the_same_everywhere(anywhere: str) -> None:
    place = place_of(anywhere)
    for step in (1, 2, 3, 4, 5, 6, 30):
        make(place / f"step-{step}", step, permanent=step in (2, 6))
    (place / "step-4").write("state.json", b"{}")
    (place / "step-4").remove(MANIFEST_NAME)
    open_directory(place, fail).retire(keep_latest=0, published=6, damaged=())
    assert len(place.folders()) == 7
    open_directory(place, fail).retire(keep_latest=1, published=6, damaged=["step-3"])
    assert place.folders() == ["step-2", "step-3", "step-30", "step-4", "step-5", "step-6"]
    assert [folder.name for folder in candidates(anywhere)][:3] == ["step-30", "step-6", "step-5"]
    assert is_checkpoint(place / "step-2")
    assert not is_checkpoint(place / "step-4")


@pytest.mark.parametrize("name", ["step-007", "step-0000", "step-\u0664", "step-1.again-1"])
def test_names_that_are_not_written_by_us_are_strangers(name):
    assert step_of(name) is None
