"""Replica groups as real processes, and a Lighthouse for them: forked, killed and started again at will.

A process that has imported torchft, or talked to a store, has threads that do not survive a fork. So this imports
neither, and groups import it for themselves.
"""

import contextlib
import faulthandler
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HEARTBEAT_TIMEOUT_SECONDS = 1.5  # after which a killed group is no longer waited for


@contextlib.contextmanager
def lighthouse(folder: Path) -> Iterator[str]:
    """Runs a Lighthouse that notices dead groups soon; its address."""
    address = folder / "lighthouse"

    def serve() -> None:
        from torchft.coordination import LighthouseServer

        server = LighthouseServer(
            bind="[::]:0",
            min_replicas=1,
            quorum_tick_ms=20,
            heartbeat_timeout_ms=round(HEARTBEAT_TIMEOUT_SECONDS * 1000),
            join_timeout_ms=20_000,
        )
        written = address.with_suffix(".tmp")
        written.write_text("http://localhost:" + server.address().rpartition(":")[2])
        written.rename(address)
        signal.pause()

    process = Group(folder, "lighthouse-process", serve)
    try:
        wait_until(address.exists)
        yield address.read_text()
    finally:
        process.kill()


class Progress:
    """How far a run is, as a part of its state."""

    step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class Group:
    """A forked process, in a process group of its own, that runs `function(*args, **kwargs)`."""

    def __init__(self, folder: Path, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self.name, self._result, self.log = name, folder / f"{name}.pickle", folder / f"{name}.txt"
        sys.stdout.flush()
        sys.stderr.flush()
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._run(lambda: function(*args, **kwargs))

    def _run(self, function: Callable[[], Any]) -> None:
        os.setsid()
        os.environ["TORCH_GLOO_LAZY_INIT"] = "0"  # who connects late may find that the other has died meanwhile
        code = 1
        with self.log.open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)  # pytest has put its own in their place
        warnings.filterwarnings("ignore", "The 'warn' method is deprecated", DeprecationWarning)  # torchft calls it
        try:
            faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
            self._result.write_bytes(pickle.dumps(function()))
            code = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)

    def result(self, timeout: float = 60.0) -> Any:
        """What the function has returned."""
        assert self.wait(timeout) == 0, self.log.read_text()
        return pickle.loads(self._result.read_bytes())

    def error(self, timeout: float = 60.0) -> str:
        """What a function that has raised has left in the log."""
        assert self.wait(timeout) == 1, self.log.read_text()
        return self.log.read_text()

    def wait(self, timeout: float = 60.0) -> int:
        """Its exit code; negative if a signal has ended it. One that does not end shows its stacks."""
        deadline = time.monotonic() + timeout
        while True:
            if (code := self.wait_briefly()) is not None:
                return code
            if time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGUSR2)
                time.sleep(0.5)
                self.kill()
                raise AssertionError(f"{self.name} hangs\n{self.log.read_text()}")
            time.sleep(0.005)

    def wait_briefly(self) -> int | None:
        """Its exit code, if it has ended."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        with contextlib.suppress(ProcessLookupError):  # it has not made its process group yet
            os.killpg(self.pid, signal.SIGKILL)
        os.kill(self.pid, signal.SIGKILL)
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Groups:
    """Starts groups; those that are left are killed at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[Group] = []

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Group:
        """A new group."""
        group = Group(self._folder, f"process-{len(self._started)}", function, *args, **kwargs)
        self._started.append(group)
        return group

    def __enter__(self) -> "Groups":
        return self

    def __exit__(self, *_: object) -> None:
        for group in self._started:
            if group.code is None:
                group.kill()


def wait_until(condition: Callable[[], Any], timeout: float = 30.0) -> None:
    """Returns once `condition` holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The address of a Lighthouse."""
    with lighthouse(tmp_path) as found:
        yield found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Groups]:
    """Starts groups, which do not outlive the test."""
    with Groups(tmp_path) as groups:
        yield groups
