"""What a run does about steps that must not move its parameters: it ends, skips them, or goes back.

`titan_core.loss_guard` judges each step on the device. Here verdicts travel to the host, which reads them when they
have come; only a bad one is waited for. What follows is the same on every rank, and does not depend on when it was
noticed: a skipped step moved nothing anyway, and a run goes back from the first bad step.
"""

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from titan_ckpt.checkpoint import Checkpoint
from titan_core.config import GuardConfig
from titan_core.loss_guard import LossGuard
from titan_metrics.accumulator import Reading
from titan_metrics.jsonl import encode
from titan_train.environment import Environment

SKIPPED = "skipped.jsonl"
"""Which samples did not count, in the run directory: a line for each skipped step, and for each batch that a run left
out when it went back."""


class DivergedError(RuntimeError):
    """The loss or its gradient is not finite, or the loss is a spike; the message says what the run has done."""


class BadStep(NamedTuple):
    """A step that did not move the parameters."""

    number: int
    """The step, counted from 1."""
    loss: float
    """Mean over the global batch."""
    grad_norm: float
    """Global norm."""

    def __str__(self) -> str:
        return f"The loss is {self.loss:g} and the gradient norm {self.grad_norm:g} at step {self.number}"


class _Verdict(NamedTuple):
    number: int
    reading: Reading
    sample_ids: Tensor


class Guard:
    """One rank's; `Stateful` for checkpoints. Called on every rank alike, but for `noticed`."""

    def __init__(self, config: GuardConfig, env: Environment, directory: Path) -> None:
        self._config, self._env, self._directory = config, env, directory
        self._judge = LossGuard(config, env.device)
        self._rewinds = torch.zeros((), dtype=torch.int64)
        self._verdicts: deque[_Verdict] = deque()
        self._skipped_last = self._in_a_row = 0

    def judge(self, number: int, loss: Tensor, grad_norm: Tensor, sample_ids: Tensor) -> Tensor:
        """1.0 if step `number` must not move parameters, else 0.0: a float32 scalar on their device.

        `loss` is the mean over the global batch, `sample_ids` this rank's rows of it.
        """
        bad = self._judge.judge(loss, grad_norm)
        numbers = torch.stack([bad.to(grad_norm.dtype), loss.to(grad_norm.dtype), grad_norm])
        self._verdicts.append(_Verdict(number, Reading(["bad", "loss", "grad_norm"], numbers), sample_ids))
        return bad

    def noticed(self) -> bool:
        """Whether a bad verdict has come; waits for none, so ranks must still agree on it."""
        while self._verdicts and self._verdicts[0].reading.ready():
            if self._verdicts[0].reading.numbers()["bad"]:
                return True
            self._verdicts.popleft()
        return False

    def settle(self) -> BadStep | None:
        """Waits for all verdicts and deals with the bad ones; returns the step to go back from, if the policy says so.

        Raises:
            DivergedError: on every rank, if the policy ends the run.
        """
        bad: list[tuple[BadStep, Tensor]] = []
        while self._verdicts:
            number, reading, sample_ids = self._verdicts.popleft()
            numbers = reading.numbers()
            if numbers["bad"]:
                bad.append((BadStep(number, numbers["loss"], numbers["grad_norm"]), sample_ids))
        for step, sample_ids in bad:
            if self._config.policy == "raise":
                raise DivergedError(
                    f"{step}. The run has diverged and stops without saving, so that earlier checkpoints stay. A lower "
                    "--optimizer.lr or a longer --schedule.warmup-steps usually helps; --guard.policy skip or rewind "
                    "with --checkpoint.allow-changes passes a few bad batches."
                )
            if self._config.policy == "rewind":
                return step
            self._skip(step, sample_ids)
        return None

    def _skip(self, step: BadStep, sample_ids: Tensor) -> None:
        self._in_a_row = self._in_a_row + 1 if step.number == self._skipped_last + 1 else 1
        self._skipped_last = step.number
        self._write(step.number, sample_ids, loss=step.loss, grad_norm=step.grad_norm)
        if self._in_a_row > self._config.max_skips:
            raise DivergedError(
                f"{step}, and {self._config.max_skips} steps before it were skipped (guard.max_skips). The run stops "
                "without saving. A lower --optimizer.lr, or a checkpoint from before it began, usually helps."
            )
        self._env.say(f"{step}: the step was skipped; {SKIPPED} names its samples.")

    def go_back(self, bad: BadStep, to: Checkpoint | None) -> Checkpoint:
        """Counts that a run goes back from `bad` to a checkpoint, if there is one, and returns it.

        Raises:
            DivergedError: on every rank, if there is none, or the run has gone back too often.
        """
        if to is None:
            raise DivergedError(
                f"{bad}, and there is no checkpoint to go back to. The run stops. Save earlier (--checkpoint.every), "
                "or see whether the run is stable at all: a lower --optimizer.lr usually helps."
            )
        if self._rewinds >= self._config.max_rewinds:
            raise DivergedError(
                f"{bad}, and the run has gone back {int(self._rewinds)} times already (guard.max_rewinds). It stops "
                "without saving. A lower --optimizer.lr usually helps."
            )
        self._verdicts.clear()
        self._rewinds += 1
        self._env.say(
            f"{bad}: going back to step {to.step}, and on without the batches up to the bad one; {SKIPPED} names their "
            "samples."
        )
        return to

    def leave_out(self, number: int, sample_ids: Tensor) -> None:
        """Writes down that the batch of what was step `number` is not trained on; `sample_ids`: this rank's rows."""
        self._write(number, sample_ids)

    def _write(self, number: int, sample_ids: Tensor, **numbers: float) -> None:
        own = [i for i in sample_ids.tolist() if i >= 0] if self._env.reads_first else []
        ids = sorted({i for rank in self._env.gather(own) for i in rank})
        line = encode({"step": number, "policy": self._config.policy, **numbers, "sample_ids": ids})

        def append() -> None:
            try:
                with (self._directory / SKIPPED).open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            except OSError as error:
                self._env.say(f"{SKIPPED} cannot be written ({error}); it would have said {line}")

        self._env.main_only(append)

    def state_dict(self) -> dict[str, Tensor]:
        """The last good losses, and how often the run went back."""
        # A copy, since what is loaded is written into these tensors first.
        return {**self._judge.state_dict(), "rewinds": self._rewinds.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a state; what this process knows of going back is not forgotten."""
        self._judge.load_state_dict({name: tensor for name, tensor in state.items() if name != "rewinds"})
        self._rewinds = torch.maximum(self._rewinds, state["rewinds"])
