"""Judging what a run exports while it trains on: a command of the user's for each export, one after another.

The command may be anything that reads the export and prints numbers, such as `scripts/evaluate.py`, which runs lm-eval.
It runs beside rank 0, on the same machine; nothing of the run waits for it, except the run's end. It can fail without
harm.
"""

import json
import math
import os
import shlex
import subprocess
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from titan_metrics.jsonl import encode
from titan_train.config import EvaluationConfig
from titan_train.environment import Environment
from titan_train.hooks import Hook, LogMetrics

FOLDER = "evaluation"
"""In the run directory: what each command said, and `results.jsonl` with what it found."""

# By which a process finds the other ranks; the command is none of them.
_OF_A_RANK = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
_OF_A_RANK += ("ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class EvaluationError(RuntimeError):
    """A command has not said what it should."""


class _Running(NamedTuple):
    step: int
    process: subprocess.Popen[bytes]
    started: float


class Evaluate(Hook):
    """Rank 0's; other ranks have none."""

    def __init__(self, config: EvaluationConfig, env: Environment, directory: Path, log: LogMetrics) -> None:
        self._config, self._env, self._log = config, env, log
        self._folder = directory / FOLDER
        self._waiting: deque[tuple[int, Path]] = deque()
        self._running: _Running | None = None

    def end_export(self, step: int, folder: Path) -> None:
        """Takes the export of `step` into the queue."""
        self._waiting.append((step, folder))
        self._go_on()

    def end_step(self, step: object) -> None:
        """Takes what a command has found, if it has ended, and starts the next one."""
        self._go_on()

    def end_run(self) -> None:
        """Waits for all that is to be judged: the run is finished."""
        if self._running or self._waiting:
            self._env.say("Waiting for the evaluation of what was exported.")
        while self._running or self._waiting:
            self._go_on()
            time.sleep(0.05)

    def close(self) -> None:
        """Ends a command that still runs: the run was interrupted, or has failed."""
        if self._running is not None:
            self._running.process.kill()
            self._running.process.wait()
            self._env.say(f"The evaluation of step {self._running.step} was given up, since the run ends.")

    def _go_on(self) -> None:
        if self._running is not None:
            self._look_at(self._running)
        if self._running is None and self._waiting:
            self._start(*self._waiting.popleft())

    def _start(self, step: int, export: Path) -> None:
        words = shlex.split(self._config.command or "")
        command = [word.replace("{export}", str(export)).replace("{step}", str(step)) for word in words]
        of_torchrun = {name for name in os.environ if name.startswith(("TORCHELASTIC_", "TORCH_NCCL_"))}
        environment = {name: value for name, value in os.environ.items() if name not in {*_OF_A_RANK, *of_torchrun}}
        try:
            self._folder.mkdir(exist_ok=True)
            with self._said(step).open("wb") as out, self._said(step, "errors").open("wb") as errors:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, env=environment
                )
        except OSError as error:
            self._give_up(step, f"it cannot be started: {error}")
            return
        self._running = _Running(step, process, time.monotonic())

    def _said(self, step: int, what: str = "output") -> Path:
        return self._folder / f"step-{step}.{what}.txt"

    def _look_at(self, running: _Running) -> None:
        step, process, started = running
        seconds = time.monotonic() - started
        code = process.poll()
        if code is None and seconds < self._config.timeout_seconds:
            return
        self._running = None
        if code is None:
            process.kill()
            process.wait()
            self._give_up(step, f"it took longer than {self._config.timeout_seconds:g} s (evaluation.timeout_seconds)")
            return
        try:
            if code != 0:
                raise EvaluationError(f"it ended with exit code {code}")
            found = last_numbers(self._said(step).read_text(errors="replace"))
            line = encode({"step": step, "seconds": seconds, **found})
            with (self._folder / "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except (OSError, EvaluationError) as error:
            self._give_up(step, str(error))
            return
        self._log.attach({"evaluation.step": step} | {f"evaluation.{name}": value for name, value in found.items()})
        listed = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        self._env.say(f"Evaluation of step {step}: {listed}")

    def _give_up(self, step: int, why: str) -> None:
        self._env.say(
            f"The evaluation of step {step} has failed: {why}. Training goes on. What the command said is in "
            f"{self._folder}/step-{step}.*.txt."
        )


def last_numbers(text: str) -> Mapping[str, float]:
    """The numbers by name that the last line of `text` is, as one JSON object.

    Raises:
        EvaluationError: if it is not.
    """
    lines = text.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found:
        raise EvaluationError('its last line of output is no JSON object of numbers such as {"accuracy": 0.25}')
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise EvaluationError(f"what it says of {name!r} is no number: {value!r}")
    return found
