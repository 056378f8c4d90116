"""Saving in the background: what is saved, when training waits, and how failures come to light."""

import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ranks import run_ranks
from titan_ckpt.checkpoint import open_checkpoint
from titan_ckpt.checkpointer import Checkpointer
from titan_ckpt.errors import CheckpointError
from titan_ckpt.open_directory import candidates
from titan_ckpt.storage import LocalOutput


def fail(message: str) -> None:
    pytest.fail(f"reported: {message}")


class Gate:
    """Holds every write back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        write = LocalOutput.write

        def wait(output: LocalOutput, view: memoryview) -> int:
            assert self.opened.wait(30)
            return write(output, view)

        monkeypatch.setattr(LocalOutput, "write", wait)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def loaded(directory: Path, step: int, tensor: torch.Tensor, box: Any) -> tuple[Any, Any]:
    target = box({"t": torch.zeros_like(tensor), "v": []})
    Checkpointer(directory, report=fail).load(open_checkpoint(directory / f"step-{step}"), {"a": target})
    return target.content["t"], target.content["v"]


def test_what_changes_after_the_call_never_reaches_the_file(tmp_path: Path, box: Any, gate: Gate) -> None:
    checkpointer = Checkpointer(tmp_path, keep_latest=0, asynchronous=True, report=fail)
    tensor, value, meta = torch.arange(5.0), [1], {"tokens": [1]}
    for step in (1, 2):
        checkpointer.wait()
        gate.opened.clear()
        checkpointer.start_save(step, {"a": box({"t": tensor, "v": value})}, meta=meta)
        assert f"step-{step}" not in names(tmp_path)
        tensor += 100  # while the save waits at the gate
        value.append(step)
        meta["tokens"].append(step)
        gate.opened.set()
    checkpointer.close()
    assert names(tmp_path) == ["step-1", "step-2"]
    for step in (1, 2):
        found, values = loaded(tmp_path, step, tensor, box)
        assert torch.equal(found, torch.arange(5.0) + 100 * (step - 1))
        assert values == open_checkpoint(tmp_path / f"step-{step}").meta["tokens"] == [1, *range(1, step)]


def test_shards_of_four_ranks_are_those_of_the_moment_of_the_call(
    tmp_path: Path, box: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(value: float) -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Linear(9, 3))
        torch.nn.init.constant_(model[0].weight, value)
        for layer in model:
            fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        return model

    def full(model: torch.nn.Module) -> dict[str, Any]:
        return {name: tensor.full_tensor().tolist() for name, tensor in model.state_dict().items()}

    def train() -> tuple[list[Any], float]:
        gate = Gate(monkeypatch)
        torch.manual_seed(0)
        model = build(1.0)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        checkpointer = Checkpointer(tmp_path, keep_latest=0, asynchronous=True, report=fail)
        at_call = []
        for step in (1, 2):
            checkpointer.wait()
            gate.opened.clear()
            own = box({"seed": [dist.get_rank(), step], "t": torch.tensor([float(dist.get_rank()), step])})
            at_call.append(full(model))
            checkpointer.start_save(step, {"model": model}, per_rank={"rng": own})
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 1
            own.content["seed"].append("later")
            own.content["t"].zero_()
            sums = []
            for number in range(20):  # training's own exchanges, while the save is held at its first write
                total = torch.tensor([float(number)])
                dist.all_reduce(total)
                sums.append(total.item())
            assert sums == [4.0 * number for number in range(20)]
            gate.opened.set()
        checkpointer.close()
        return at_call, checkpointer.last_blocking_seconds

    def load(step: int) -> dict[str, Any]:
        model = build(0.0)
        checkpoint = open_checkpoint(tmp_path / f"step-{step}")
        Checkpointer(tmp_path, report=fail).load(checkpoint, {"model": model}, skip=["rng"])
        return full(model)

    def own(step: int) -> Any:
        target = box({"seed": [], "t": torch.zeros(2)})
        checkpoint = open_checkpoint(tmp_path / f"step-{step}")
        Checkpointer(tmp_path, report=fail).load(checkpoint, {}, per_rank={"rng": target}, skip=["model"])
        return target.content["seed"], target.content["t"].tolist()

    (at_call, blocked), *_ = run_ranks(4, train)
    assert 0 < blocked < 60
    assert at_call[0] != at_call[1]
    for step in (1, 2):
        assert run_ranks(2, load, step) == [at_call[step - 1]] * 2
        assert run_ranks(4, own, step) == [([rank, step], [float(rank), float(step)]) for rank in range(4)]


def test_a_second_save_waits_for_the_first_when_the_disk_is_slow(
    tmp_path: Path, box: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = LocalOutput.write

    def slowly(output: LocalOutput, view: memoryview) -> int:
        if "manifest" in output.name:
            time.sleep(0.5)
        return write(output, view)

    monkeypatch.setattr(LocalOutput, "write", slowly)
    checkpointer = Checkpointer(tmp_path, asynchronous=True, report=fail)
    tensor = torch.ones(10)
    blocked = []
    for step in (1, 2, 3):
        checkpointer.start_save(step, {"a": box({"t": tensor, "v": step})})
        blocked.append(checkpointer.last_blocking_seconds)
        tensor += 1
        # At most one in flight: the one before is there in full when the next call returns.
        assert [folder.name for folder in candidates(tmp_path)][: step - 1] == [
            f"step-{s}" for s in range(step - 1, 0, -1)
        ]
    checkpointer.save(4, {"a": box({"t": tensor, "v": 4})})  # waits too
    assert names(tmp_path) == ["step-3", "step-4"]
    assert blocked[0] < 0.4 < min(blocked[1:])
    assert loaded(tmp_path, 3, tensor, box) == (pytest.approx(torch.full((10,), 3.0)), 3)


def test_a_disk_that_fills_up_meanwhile_is_one_error_on_all_ranks_and_training_goes_on(
    tmp_path: Path, box: Any
) -> None:
    def train() -> tuple[str, bool]:
        checkpointer = Checkpointer(tmp_path, asynchronous=True, report=fail)
        state = {"a": box({"t": torch.ones(100_000), "u": torch.ones(100_000)})}
        checkpointer.save(1, state)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == 1:  # a file larger than this fails as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        checkpointer.start_save(2, state)
        noticed, failed = torch.tensor([0]), False
        while not noticed.item():  # as a trainer does at each step
            failed = checkpointer.failed
            noticed = torch.tensor([int(failed)])
            dist.all_reduce(noticed)
        with pytest.raises(CheckpointError) as raised:
            checkpointer.wait()
        assert not checkpointer.failed
        checkpointer.wait()  # an error is told once
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        dist.barrier()
        assert names(tmp_path) == ["step-1"]
        dist.barrier()
        checkpointer.start_save(3, state)
        checkpointer.close()
        return str(raised.value), failed

    results = run_ranks(2, train)
    assert results[0][0] == results[1][0]
    assert any(failed for _, failed in results)
    assert f"Step 2 could not be saved in {tmp_path}: rank 1: [Errno 27] File too large" in results[0][0]
    assert names(tmp_path) == ["step-1", "step-3"]


def test_a_failure_stops_the_next_save_before_it_starts(
    tmp_path: Path, box: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = Checkpointer(tmp_path, asynchronous=True, report=fail)
    with monkeypatch.context() as patch:
        patch.setattr(LocalOutput, "write", lambda output, view: (_ for _ in ()).throw(OSError(28, "No space left")))
        checkpointer.start_save(1, {"a": box({"t": torch.ones(1)})})
        with pytest.raises(CheckpointError, match=r"Step 1 could not be saved.*No space left"):
            checkpointer.start_save(2, {"a": box({"t": torch.ones(1)})})
    checkpointer.start_save(3, {"a": box({"t": torch.ones(1)})})
    checkpointer.wait()
    assert names(tmp_path) == ["step-3"]


def test_a_leaf_that_one_rank_cannot_save_is_an_error_on_all(tmp_path: Path, box: Any) -> None:
    def train() -> str:
        checkpointer = Checkpointer(tmp_path, asynchronous=True, report=fail)
        checkpointer.start_save(1, {"a": box({"x": object() if os.environ["RANK"] == "1" else 1})})
        with pytest.raises(CheckpointError) as raised:
            checkpointer.close()
        return str(raised.value)

    one, two = run_ranks(2, train)
    assert one == two
    assert "rank 1: These cannot be saved: a.x is of type object" in one
    assert names(tmp_path) == []


def test_it_must_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make it with asynchronous=True"):
        Checkpointer(tmp_path).start_save(1, {})
    checkpointer = Checkpointer(tmp_path, asynchronous=True)
    checkpointer.close()
    checkpointer.close()
    with pytest.raises(ValueError, match="saves synchronously only"):
        checkpointer.start_save(1, {})
