"""The folder a run writes to: its lock, its resolved configuration, and its name if the user gave none."""

import datetime
import fcntl
import itertools
import os
from pathlib import Path
from typing import IO

from titan_train.config import TrainConfig
from titan_train.config_file import to_json


class RunDirectoryError(RuntimeError):
    """The run directory cannot be written, or another process writes to it."""


def default_directory(name: str) -> Path:
    """`runs/<name>-<time>`, for a run that was given no directory; with a number if there is one from this second."""
    first = Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    others = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([first], others) if not path.exists())


def own_folder(config: TrainConfig) -> Path:
    """Where this process and its ranks write what no others do: the run directory, or their group's part of it."""
    run = Path(config.output or "")
    return run / "groups" / str(config.replica.group) if config.replica.enabled else run


def checkpoint_directory(config: TrainConfig) -> str | Path:
    """Where checkpoints are: of the run, or with averaging of each group."""
    given, averaging = config.checkpoint.directory, config.replica.averaging.method != "none"
    if given is None:
        return (own_folder(config) if averaging else Path(config.output or "")) / "checkpoints"
    return f"{given.rstrip('/')}/groups/{config.replica.group}" if averaging else given


class RunDirectory:
    """A run's folder, which one process at a time may claim for writing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def claim(self) -> None:
        """Makes the folder and locks it for this process.

        Raises:
            RunDirectoryError: if it cannot be written, or another process has claimed it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("a+")
        except OSError as error:
            raise RunDirectoryError(
                f"Cannot write to the run directory {self.path} ({error.strerror}); choose another with --output."
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with lock:
                lock.seek(0)
                holder = lock.read().strip()
            raise RunDirectoryError(
                f"The run directory {self.path} is in use by another titan-train (process {holder}); wait for it to "
                "end, stop it, or choose another directory with --output."
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {os.uname().nodename}")
        lock.flush()
        self._lock = lock

    def write_config(self, config: TrainConfig) -> None:
        """Writes the resolved configuration to `config.json`, replacing an older one whole."""
        temporary = self.path / "config.json.tmp"
        temporary.write_text(to_json(config))
        temporary.replace(self.path / "config.json")

    def release(self) -> None:
        """Lets another process claim it; does nothing if this one has not."""
        if self._lock is not None:
            self._lock.close()
