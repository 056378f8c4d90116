"""A run that is killed at any moment, also inside a save, finds a whole checkpoint; a full disk costs only one."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from titan_ckpt.checkpoint import open_checkpoint
from titan_ckpt.checkpointer import Checkpointer
from titan_ckpt.errors import CheckpointError
from titan_ckpt.location import place_of

ROWS = 40_000  # float32: two pieces, so that a save takes a while


def fail(message: str) -> None:
    pytest.fail(f"reported: {message}")


def save_without_end(location: str, log: Path, box: Any) -> None:
    """Goes on a step before the newest checkpoint, so that steps are saved again; logs what was published."""
    checkpointer = Checkpointer(location, asynchronous=True, report=fail)
    checkpoint = checkpointer.newest_whole()
    step = checkpoint.step if checkpoint else 1
    while True:
        state = {"a": box({"t": torch.full((ROWS,), float(step)), "u": torch.full((ROWS,), float(step)), "v": step})}
        if step % 2:
            checkpointer.save(step, state, files={"f": str(step).encode()})
        else:
            checkpointer.start_save(step, state, files={"f": str(step).encode()})
            checkpointer.wait()
        with log.open("a") as file:
            file.write(f"{step} ")
        step += 1


def kill_after(seconds: float, location: str, log: Path, box: Any) -> None:
    """Kills a child that saves, so many seconds after it has begun to."""
    log.write_text("")
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            save_without_end(location, log, box)
        finally:
            os._exit(1)
    while not log.read_text():  # its first save is done
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the child ended by itself"
        time.sleep(0.005)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("times", [3, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["local", "s3"])
def test_killed_at_random_moments(
    times: int, kind: str, request: pytest.FixtureRequest, tmp_path: Path, box: Any
) -> None:
    location = str(tmp_path / "run") if kind == "local" else request.getfixturevalue("s3")
    moments = random.Random(times)
    for _ in range(times):
        kill_after(moments.uniform(0, 0.5), location, tmp_path / "log", box)
        published = int((tmp_path / "log").read_text().split()[-1])
        reader = Checkpointer(location, report=fail)
        checkpoint = reader.newest_whole()
        assert checkpoint is not None
        assert checkpoint.step >= published
        target = box({"t": torch.zeros(ROWS), "u": torch.zeros(ROWS), "v": 0})
        reader.load(checkpoint, {"a": target})
        assert target.content["v"] == checkpoint.step == int(checkpoint.read_file("f"))
        assert target.content["t"].eq(checkpoint.step).all()
        assert target.content["u"].eq(checkpoint.step).all()
    step = checkpoint.step + 1
    Checkpointer(location, report=fail).save(step, {"a": box({"v": 0})})
    place = place_of(location)
    assert len(place.folders()) == 2
    assert not [name for name in place.files() if "/" not in name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not shutil.which("mount") or os.getuid() != 0:
        pytest.skip("only root can mount a small file system")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_costs_one_checkpoint_and_no_other(small_disk: Path, box: Any, asynchronous: bool) -> None:
    directory = small_disk / "run"
    checkpointer = Checkpointer(directory, keep_latest=0, asynchronous=asynchronous, report=fail)

    def save(step: int, numbers: int) -> None:
        state = {"a": box({"t": torch.full((numbers,), step)})}
        if asynchronous:
            checkpointer.start_save(step, state)
            checkpointer.wait()
        else:
            checkpointer.save(step, state)

    save(1, 1000)
    with pytest.raises(CheckpointError, match=r"Step 2 could not be saved.*No space left on device.*make room"):
        save(2, 1_000_000)
    assert [path.name for path in directory.iterdir()] == ["step-1"]
    save(3, 1000)
    checkpoint = checkpointer.newest_whole()
    assert checkpoint is not None
    assert checkpoint.step == 3
    assert open_checkpoint(directory / "step-1").step == 1
    checkpointer.close()
