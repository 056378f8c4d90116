"""`status.json` in a run's directory: what became of the run, for the launcher that started it to read.

A process that is killed leaves `running` behind; whether it still runs, its `process` on its `host` tells.
"""

import contextlib
import datetime
import json
import os
import signal
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

STATUS_NAME = "status.json"


class StatusFile:
    """Says `running` once entered, `failed` if the block raises, and what `end` was told otherwise."""

    def __init__(self, run_directory: Path) -> None:
        self._path = run_directory / STATUS_NAME

    def end(self, step: int, by: signal.Signals | None) -> None:
        """The run ends after `step`: finished or, if a signal has asked for it, preempted."""
        if by is None:
            self._write("finished", step=step)
        else:
            self._write("preempted", step=step, signal=by.name)

    def __enter__(self) -> Self:
        self._write("running")
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            self._write("preempted", step=None)
        elif error is not None:
            self._write("failed", error=f"{type(error).__name__}: {error}")

    def _write(self, status: Literal["running", "finished", "preempted", "failed"], **details: Any) -> None:
        values = {
            "status": status,
            **details,
            "host": os.uname().nodename,
            "process": os.getpid(),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        # A full disk must not stop what the file only reports.
        with contextlib.suppress(OSError):
            temporary = self._path.with_name(f"{STATUS_NAME}.tmp")
            temporary.write_text(json.dumps(values, indent=2) + "\n")
            temporary.replace(self._path)
