"""Checkpoints in object stores: a real S3 server, and fsspec's memory where nothing of S3 is needed."""

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ranks import run_ranks
from titan_ckpt.checkpoint import open_checkpoint
from titan_ckpt.checkpointer import Checkpointer
from titan_ckpt.errors import CheckpointError, DamagedCheckpointError
from titan_ckpt.location import place_of
from titan_ckpt.remote_place import RemotePlace


def fail(message: str) -> None:
    pytest.fail(f"reported: {message}")


def sharded(value: float) -> DTensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(torch.arange(21.0).view(7, 3) + value, mesh, [Shard(0)])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_ranks_write_their_own_files_and_another_number_reads_them(s3: str, box: Any, asynchronous: bool) -> None:
    def save() -> None:
        checkpointer = Checkpointer(s3, asynchronous=asynchronous, report=fail)
        state = {"a": box({"t": sharded(1.0), "v": [1, 2]})}
        own = {"rng": box({"seed": dist.get_rank()})}
        files = {"config.json": b"{}"}
        if asynchronous:
            checkpointer.start_save(5, state, per_rank=own, files=files)
        else:
            checkpointer.save(5, state, per_rank=own, files=files)
        checkpointer.close()

    def load() -> Any:
        checkpointer = Checkpointer(s3, report=lambda message: None)
        checkpoint = checkpointer.newest_whole()
        assert checkpoint is not None
        target = box({"t": sharded(0.0), "v": []})
        checkpointer.load(checkpoint, {"a": target}, per_rank={"rng": box({"seed": -1})})
        return checkpoint.step, target.content["t"].full_tensor().tolist(), target.content["v"]

    run_ranks(2, save)
    assert {"__0_0.distcp", "__1_0.distcp"} < (place_of(s3) / "step-5").files().keys()
    expected = (5, (torch.arange(21.0).view(7, 3) + 1).tolist(), [1, 2])
    assert run_ranks(3, load) == [expected] * 3
    checkpoint = open_checkpoint(f"{s3}/step-5")
    assert (checkpoint.path, checkpoint.read_file("config.json")) == (None, b"{}")


def test_a_hundred_saves_leave_exactly_what_is_to_be_kept(memory: str, box: Any) -> None:
    place = place_of(memory)
    place.write("step-1000", b"a file of somebody else")
    place.write("backup-step-77/x", b"mine")
    checkpointer = Checkpointer(memory, keep_latest=2, report=fail)
    for number in range(100):
        checkpointer.save(number // 2, {"a": box({"v": number})}, permanent=number == 41)  # each step twice
    assert place.folders() == [
        "backup-step-77",
        "step-20.again-00000001",
        "step-48.again-00000001",
        "step-49.again-00000001",
    ]
    assert [name for name in place.files() if "/" not in name] == ["step-1000"]
    checkpoint = checkpointer.newest_whole()
    assert checkpoint is not None
    assert checkpoint.read_values() == {"a.v": 99}


def test_damage_is_found_and_the_one_before_is_taken(s3: str, box: Any) -> None:
    checkpointer = Checkpointer(s3, keep_latest=0, report=fail)
    for step in (1, 2, 3):
        checkpointer.save(step, {"a": box({"t": torch.full((1000,), step), "v": step})})
    place = place_of(s3)
    content = bytearray(place.read("step-3/__0_0.distcp"))
    content[len(content) // 2] ^= 1
    place.write("step-3/__0_0.distcp", bytes(content))
    place.remove("step-2/state.json")
    reports: list[str] = []
    checkpoint = Checkpointer(s3, report=reports.append).newest_whole()
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert [report.partition(" is damaged: ")[2] for report in reports] == [
        "__0_0.distcp has other bytes than were written (its SHA-256 differs). It is skipped.",
        "state.json is missing. It is skipped.",
    ]
    with pytest.raises(DamagedCheckpointError, match=f"{s3}/step-2 is damaged"):
        open_checkpoint(f"{s3}/step-2")


def test_a_store_that_refuses_is_one_error_and_nothing_remains(
    memory: str, box: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = Checkpointer(memory, report=fail)
    checkpointer.save(1, {"a": box({"v": 1})})
    before = place_of(memory).files()
    create = RemotePlace.create

    def refuse(place: RemotePlace, name: str, *more: Any) -> Any:
        if name == "manifest.json":
            raise PermissionError(13, "quota exceeded")
        return create(place, name, *more)

    with monkeypatch.context() as patch:
        patch.setattr(RemotePlace, "create", refuse)
        for step in (1, 2):
            with pytest.raises(CheckpointError, match=r"quota exceeded.*Nothing of it remains"):
                checkpointer.save(step, {"a": box({"v": step})})
    assert place_of(memory).files() == before
    checkpointer.save(2, {"a": box({"v": 2})})


def test_a_bucket_that_is_not_there_is_named_before_anything_is_written(s3_server: str, box: Any) -> None:
    checkpointer = Checkpointer("s3://absent/run", report=fail)
    with pytest.raises(CheckpointError, match="its bucket doesn't exist"):
        checkpointer.newest_whole()
    with pytest.raises(CheckpointError, match="its bucket doesn't exist"):
        checkpointer.save(1, {"a": box({"v": 1})})


def test_who_reads_while_another_writes_never_sees_half_a_checkpoint(anywhere: str, box: Any) -> None:
    writer = Checkpointer(anywhere, report=fail)
    writer.save(0, {"a": box({"t": torch.zeros(100), "v": 0})})
    stop, found, problems = threading.Event(), [], []

    def read() -> None:
        try:
            while not stop.is_set():
                checkpoint = Checkpointer(anywhere, report=problems.append).newest_whole()
                found.append(checkpoint.step if checkpoint else None)
        except CheckpointError as error:
            problems.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for step in range(1, 30 if place_of(anywhere).path else 10):
            writer.save(step, {"a": box({"t": torch.full((100,), step), "v": step})})
    finally:
        stop.set()
        reader.join()
    assert problems == []
    assert found == sorted(found)
    assert len(set(found)) > 1
