import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ranks import RankFailure, run_ranks
from titan_ckpt import storage
from titan_ckpt.checkpoint import open_checkpoint
from titan_ckpt.checkpointer import Checkpointer
from titan_ckpt.errors import CheckpointError
from titan_ckpt.location import place_of

STRANGERS = ["backup-step-77", "step-5.tmp", "step-abc"]


def fail(message: str) -> None:
    pytest.fail(f"reported: {message}")


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def forked(function: Callable[[], Any]) -> int:
    """The exit code of a child that runs `function`: 0, minus the signal that killed it, or 1 for an exception."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class AdamState:
    """An optimizer's state keyed by FQN and nested, as training code hands it over."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.fqns = {parameter: name for name, parameter in model.named_parameters()}
        self.optimizer = optimizer
        for parameter in self.fqns:  # a first step makes the state that a load fills
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        state = {name: self.optimizer.state[parameter] for parameter, name in self.fqns.items()}
        return {"state": state, "lr": self.optimizer.param_groups[0]["lr"], "betas": (0.9, 0.95)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for parameter, name in self.fqns.items():
            self.optimizer.state[parameter] = state_dict["state"][name]
        self.optimizer.param_groups[0]["lr"] = state_dict["lr"]


class Run:
    """A little model on the layout at hand (FSDP2 on all ranks of a group, else one process), and its optimizer."""

    def __init__(self, seed: int, lr: float) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Linear(10, 3))
        if dist.is_initialized():
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for layer in self.model:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self.state = {"model": self.model, "optimizer": AdamState(self.model, self.optimizer)}

    def train(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = parameter.detach().clone() * 0.1
        self.optimizer.step()

    def full(self) -> dict[str, Any]:
        """Everything that is saved, gathered, as lists (exact for float32)."""
        optimizer = self.state["optimizer"].state_dict()
        tensors = {
            **self.model.state_dict(),
            **{f"{k}.{n}": t for k, s in optimizer["state"].items() for n, t in s.items()},
        }
        whole = {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in tensors.items()}
        return {"lr": optimizer["lr"], **{key: tensor.tolist() for key, tensor in whole.items()}}


def test_a_run_moves_from_2_ranks_to_4_to_3_to_1_bit_by_bit(tmp_path: Path) -> None:
    def start() -> dict[str, Any]:
        run = Run(seed=1, lr=0.5)
        run.train()
        Checkpointer(tmp_path, report=fail).save(0, run.state)
        return run.full()

    def move() -> dict[str, Any]:
        run = Run(seed=2, lr=0.1)
        checkpointer = Checkpointer(tmp_path, report=fail)
        checkpoint = checkpointer.newest_whole()
        assert checkpoint is not None
        checkpointer.load(checkpoint, run.state)
        checkpointer.save(checkpoint.step + 1, run.state)
        return run.full()

    expected, _ = run_ranks(2, start)
    assert run_ranks(4, move) == [expected] * 4
    assert run_ranks(3, move) == [expected] * 3
    assert move() == expected
    assert names(tmp_path) == {"step-2", "step-3"}


def test_what_each_rank_has_of_its_own_comes_back_on_as_many_ranks_only(tmp_path: Path, box: Any) -> None:
    def run(save: bool) -> tuple[list[str], Any, Any]:
        reports: list[str] = []
        rank = dist.get_rank()
        own = (
            box({"seed": rank, "t": torch.tensor([float(rank)])})
            if save
            else box({"seed": -1, "t": torch.zeros(1) - 1})
        )
        checkpointer = Checkpointer(tmp_path, report=reports.append)
        if save:
            checkpointer.save(1, {"a": box({"x": 1})}, per_rank={"rng": own})
        else:
            checkpointer.load(checkpointer.newest_whole(), {"a": box({"x": 0})}, per_rank={"rng": own})
        return reports, own.content["seed"], own.content["t"].item()

    run_ranks(2, run, True)
    assert run_ranks(2, run, False) == [([], 0, 0.0), ([], 1, 1.0)]
    (reports, *first), *others = run_ranks(3, run, False)
    assert first == [-1, -1.0]
    assert others == [([], -1, -1.0)] * 2
    assert len(reports) == 1
    assert "saved by 2 rank(s) and is restored on 3" in reports[0]


@pytest.fixture
def saved(tmp_path: Path, box: Any) -> Path:
    """Steps 1 to 3, each holding its own number."""
    for step in (1, 2, 3):
        Checkpointer(tmp_path, keep_latest=0).save(step, {"a": box({"t": torch.full((1000,), step), "v": step})})
    return tmp_path


def test_the_newest_whole_one_is_found_and_the_damaged_are_reported(saved: Path) -> None:
    flip(saved / "step-3" / "__0_0.distcp")
    os.truncate(saved / "step-2" / ".metadata", 10)

    def find() -> tuple[int, list[str]]:
        reports: list[str] = []
        checkpoint = Checkpointer(saved, report=reports.append).newest_whole()
        assert checkpoint is not None
        return checkpoint.step, reports

    (step, reports), other = run_ranks(2, find)
    assert step == 1
    assert other == (1, [])
    assert len(reports) == 2
    assert "step-3 is damaged: __0_0.distcp has other bytes" in reports[0]
    assert "step-2 is damaged: .metadata has 10 bytes instead of" in reports[1]


def test_one_that_is_retired_while_it_is_verified_is_not_damaged(
    saved: Path, box: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_late(folder: Any, **more: Any) -> Any:
        if folder.name == "step-3" and folder.exists():  # meanwhile the run goes on
            for step in (4, 5):
                Checkpointer(saved, report=fail).save(step, {"a": box({"v": step})})
        return open_checkpoint(folder, **more)

    monkeypatch.setattr("titan_ckpt.checkpointer.open_checkpoint", open_late)
    checkpoint = Checkpointer(saved, report=fail).newest_whole()
    assert checkpoint is not None
    assert checkpoint.step == 5


def test_hashes_can_be_left_out(saved: Path) -> None:
    flip(saved / "step-3" / "__0_0.distcp")
    checkpoint = Checkpointer(saved, verify_hashes=False, report=fail).newest_whole()
    assert checkpoint is not None
    assert checkpoint.step == 3


def test_there_may_be_none(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path / "absent", report=fail).newest_whole() is None
    assert not (tmp_path / "absent").exists()
    assert Checkpointer("s3://bucket/run").directory == place_of("s3://bucket/run")


def test_damage_goes_to_the_log_unless_told_otherwise(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    (saved / "step-3" / "state.json").unlink()
    Checkpointer(saved).newest_whole()
    assert "state.json is missing" in caplog.text


def test_bytes_that_change_on_their_way_to_the_disk_are_found(
    tmp_path: Path, box: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = storage.HashingFile._write

    def corrupt(self: Any, view: memoryview) -> None:
        write(self, memoryview(bytes(view).replace(b"precious", b"Precious")))

    monkeypatch.setattr(storage.HashingFile, "_write", corrupt)
    reports: list[str] = []
    checkpointer = Checkpointer(tmp_path, report=reports.append)
    checkpointer.save(1, {"a": box({"v": "precious"})})
    assert checkpointer.newest_whole() is None
    assert "state.json has other bytes" in reports[0]


def test_strangers_neither_break_anything_nor_go(tmp_path: Path, box: Any) -> None:
    for name in STRANGERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("mine")
    (tmp_path / "step-9").write_text("mine")
    checkpointer = Checkpointer(tmp_path, keep_latest=2, report=fail)
    for step in (1, 2, 10):
        checkpointer.save(step, {"a": box({"v": step})})
    assert names(tmp_path) == {*STRANGERS, "step-2", "step-9", "step-10"}
    assert all((tmp_path / name / "precious").read_text() == "mine" for name in STRANGERS)
    with pytest.raises(CheckpointError, match="step-9 is in the way"):
        checkpointer.save(9, {"a": box({"v": 9})})
    assert (tmp_path / "step-9").read_text() == "mine"


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process has written outlives it without; only power cuts need it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.usefixtures("no_sync")
def test_a_hundred_saves_leave_exactly_what_is_to_be_kept(tmp_path: Path, box: Any) -> None:
    for name in (*STRANGERS, "step-7.again-1"):
        (tmp_path / name).mkdir()
    strangers = names(tmp_path)
    checkpointer = Checkpointer(tmp_path, keep_latest=3, report=fail)
    for step in range(100):
        checkpointer.save(step, {"a": box({"v": step})})
    assert names(tmp_path) == {*strangers, "step-97", "step-98", "step-99"}


def test_the_newest_whole_one_outlives_a_damaged_one_that_is_newer(saved: Path, box: Any) -> None:
    flip(saved / "step-3" / "__0_0.distcp")
    checkpointer = Checkpointer(saved, keep_latest=2, report=lambda message: None)
    checkpoint = checkpointer.newest_whole()
    assert checkpoint is not None
    assert checkpoint.step == 2
    checkpointer.save(4, {"a": box({"v": 4})})
    assert names(saved) == {"step-2", "step-3", "step-4"}
    checkpointer.save(3, {"a": box({"v": 3})})  # redone: from here on it is a checkpoint like any other
    checkpointer.save(5, {"a": box({"v": 5})})
    checkpointer.save(6, {"a": box({"v": 6})})
    assert names(saved) == {"step-5", "step-6"}


def test_a_step_saved_again_replaces_the_old_one(saved: Path, box: Any) -> None:
    checkpointer = Checkpointer(saved, keep_latest=0, report=fail)
    checkpointer.save(3, {"a": box({"v": "again"})})
    checkpoint = checkpointer.newest_whole()
    assert checkpoint is not None
    assert checkpoint.read_values() == {"a.v": "again"}
    assert names(saved) == {"step-1", "step-2", "step-3"}


@pytest.mark.parametrize("keep_latest", [-1, 1])
def test_one_alone_is_not_enough_to_keep(keep_latest: int) -> None:
    with pytest.raises(ValueError, match=f"keep_latest is {keep_latest}; give at least 2"):
        Checkpointer(Path("x"), keep_latest=keep_latest)


def test_permanent_ones_stay_and_do_not_count(tmp_path: Path, box: Any) -> None:
    for step in range(10):
        Checkpointer(tmp_path, report=fail).save(step, {"a": box({"v": step})}, permanent=step in (1, 4, 9))
    assert names(tmp_path) == {"step-1", "step-4", "step-7", "step-8", "step-9"}
    assert open_checkpoint(tmp_path / "step-4").manifest.permanent
    Checkpointer(tmp_path, report=fail).save(4, {"a": box({"v": 4})})  # saved again as one that may go
    for step in (10, 11):
        Checkpointer(tmp_path, report=fail).save(step, {"a": box({"v": step})})
    assert names(tmp_path) == {"step-1", "step-9", "step-10", "step-11"}


def killed_at(moment: int) -> None:
    """Lets this process die, as if pulled from the wall, just before its `moment`-th use of the file system."""
    left = moment

    def count(event: str, arguments: tuple) -> None:
        nonlocal left
        if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def moments(save: Callable[[], None], prepare: Callable[[], None]) -> Iterator[int]:
    """Runs `save` again and again in children killed one use of the file system later each time, to the end."""
    for moment in range(1, 1000):
        prepare()
        code = forked(lambda moment=moment: (killed_at(moment), save()))
        assert code in (0, -signal.SIGKILL)
        yield moment
        if code == 0:
            return


@pytest.mark.usefixtures("no_sync")
def test_killed_at_any_moment_of_a_save_there_is_a_whole_checkpoint(tmp_path: Path, box: Any) -> None:
    directory = tmp_path / "checkpoints"

    def save(step: int, value: str) -> None:
        state = {"a": box({"t": torch.tensor([ord(value)]), "v": value})}
        Checkpointer(directory, keep_latest=2, report=fail).save(step, state, files={"f": value.encode()})

    def prepare() -> None:
        shutil.rmtree(directory, ignore_errors=True)
        save(0, "0")
        save(1, "a")

    def save_twice() -> None:
        save(1, "b")  # replaces a checkpoint
        save(2, "c")  # retires one

    seen = []
    for _ in moments(save_twice, prepare):
        checkpointer = Checkpointer(directory, report=fail)
        checkpoint = checkpointer.newest_whole()
        assert checkpoint is not None
        target = box({"t": torch.zeros(1, dtype=torch.int64), "v": ""})
        checkpointer.load(checkpoint, {"a": target})
        value = target.content["v"]
        assert target.content["t"].item() == ord(value)
        assert checkpoint.read_file("f") == value.encode()
        seen.append(value)
        save(3, "d")
        save(4, "e")
        assert names(directory) == {"step-3", "step-4"}
    assert "".join(seen) == "a" * seen.count("a") + "b" * seen.count("b") + "c" * seen.count("c")
    assert min(seen.count("a"), seen.count("b"), seen.count("c")) > 5


def test_a_killed_rank_leaves_the_older_checkpoint_and_no_rubbish(saved: Path, box: Any) -> None:
    def save() -> None:
        if dist.get_rank() == 1:
            killed_at(1)
        Checkpointer(saved).save(4, {"a": box({"t": torch.ones(10), "u": torch.ones(10)})})

    with pytest.raises(RankFailure):
        run_ranks(2, save)
    checkpointer = Checkpointer(saved, keep_latest=2, report=fail)
    checkpoint = checkpointer.newest_whole()
    assert checkpoint is not None
    assert checkpoint.step == 3
    checkpointer.save(4, {"a": box({})})
    assert names(saved) == {"step-3", "step-4"}


def test_a_full_disk_on_one_rank_is_one_error_on_all_and_the_run_goes_on(saved: Path, box: Any) -> None:
    def save() -> str:
        checkpointer = Checkpointer(saved, keep_latest=0, report=fail)
        state = {"a": box({"t": torch.ones(100_000), "u": torch.ones(100_000)})}
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == 1:  # a file larger than this fails as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(CheckpointError) as raised:
            checkpointer.save(4, state)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        dist.barrier()
        assert names(saved) == {"step-1", "step-2", "step-3"}
        dist.barrier()
        checkpointer.save(4, state)
        return str(raised.value)

    one, two = run_ranks(2, save)
    assert one == two
    assert f"Step 4 could not be saved in {saved}: rank 1: [Errno 27] File too large: " in one
    assert "older checkpoints are untouched" in one
    checkpoint = Checkpointer(saved, report=fail).newest_whole()
    assert checkpoint is not None
    assert checkpoint.step == 4


def test_a_folder_that_may_only_be_read_gives_checkpoints_but_takes_none(box: Any) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own temporary folders are closed to other users
        directory = Path(name) / "checkpoints"
        Checkpointer(directory).save(1, {"a": box({"v": 1, "t": torch.ones(1)})})
        for path in (Path(name), directory):
            path.chmod(0o555)

        def use() -> None:
            if os.getuid() == 0:
                os.setuid(65534)  # modes do not bind root
            checkpointer = Checkpointer(directory, report=fail)
            target = box({"v": 0, "t": torch.zeros(1)})
            checkpointer.load(checkpointer.newest_whole(), {"a": target})
            assert target.content["v"] == 1
            with pytest.raises(CheckpointError, match=r"Step 2 could not be saved.*Permission denied"):
                checkpointer.save(2, {"a": target})

        assert forked(use) == 0
        assert names(directory) == {"step-1"}
        Path(name).chmod(0o755)
        directory.chmod(0o755)


def test_an_interrupted_save_leaves_nothing(saved: Path, box: Any) -> None:
    class Interrupted(box):
        def state_dict(self) -> dict[str, Any]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Checkpointer(saved).save(4, {"a": Interrupted({})})
    assert names(saved) == {"step-1", "step-2", "step-3"}


def test_a_leaf_that_cannot_be_saved_is_an_error_that_names_it(tmp_path: Path, box: Any) -> None:
    with pytest.raises(CheckpointError, match=r"a\.x is of type object"):
        Checkpointer(tmp_path).save(1, {"a": box({"x": object()})})
    assert names(tmp_path) == set()
