"""What a run does about steps that must not move its parameters: it ends, skips them, or goes back.

`titan_core.loss_guard` judges each step on the device. Here verdicts travel to the host, which reads them when they
have come; only a bad one is waited for. What follows is the same on every rank, and does not depend on when it was
noticed: a skipped step moved nothing anyway, and a run goes back from the first bad step.
"""

import math
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
from titan_metrics.jsonl import encode, resume_jsonl
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
    limit: float
    """Above which the loss is a spike."""

    def __str__(self) -> str:
        if self.loss > self.limit and math.isfinite(self.loss) and math.isfinite(self.grad_norm):
            return (
                f"The loss at step {self.number} is a spike: {self.loss:g}, where the last ones allow {self.limit:g} "
                "(guard.sigma, guard.window)"
            )
        return f"The loss is {self.loss:g} and the gradient norm {self.grad_norm:g} at step {self.number}"


class _Verdict(NamedTuple):
    number: int
    reading: Reading
    sample_ids: Tensor


class _State(NamedTuple):
    """What a checkpoint remembers, beside the last losses."""

    rewinds: int = 0
    """How often the run went back."""
    skipped_last: int = 0
    """The last step that was skipped."""
    in_a_row: int = 0
    """How many steps were, up to it, without one between them that was not."""


class Guard:
    """One rank's; `Stateful` for checkpoints. Called on every rank alike, but for `noticed`."""

    def __init__(self, config: GuardConfig, env: Environment, directory: Path) -> None:
        self._config, self._env, self._directory = config, env, directory
        self._judge = LossGuard(config, env.device)
        self._state = _State()
        self._verdicts: deque[_Verdict] = deque()
        self._went_back_to: int | None = None
        self._left_out = 0  # batches, since the run first went back to that step

    def judge(self, number: int, loss: Tensor, grad_norm: Tensor, sample_ids: Tensor) -> Tensor:
        """1.0 if step `number` must not move parameters, else 0.0: a float32 scalar on their device.

        `loss` is the mean over the global batch, `sample_ids` this rank's rows of it.
        """
        bad = self._judge.judge(loss, grad_norm)
        numbers = torch.stack([number.to(grad_norm) for number in (bad, loss, grad_norm, self._judge.limit)])
        self._verdicts.append(_Verdict(number, Reading(["bad", "loss", "grad_norm", "limit"], numbers), sample_ids))
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
                step = BadStep(number, numbers["loss"], numbers["grad_norm"], numbers["limit"])
                bad.append((step, sample_ids))
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
        goes_on = step.number == self._state.skipped_last + 1
        in_a_row = self._state.in_a_row + 1 if goes_on else 1
        self._state = self._state._replace(skipped_last=step.number, in_a_row=in_a_row)
        self._write(step.number, sample_ids, loss=step.loss, grad_norm=step.grad_norm)
        if in_a_row > self._config.max_skips:
            raise DivergedError(
                f"{step}, and {self._config.max_skips} steps before it were skipped (guard.max_skips). The run stops "
                "without saving. A lower --optimizer.lr, or a checkpoint from before it began, usually helps; if the "
                "losses are no spikes to you, a larger --guard.sigma or --guard.window."
            )
        self._env.say(f"{step}: the step was skipped; {SKIPPED} names its samples.")

    def go_back(self, bad: BadStep, to: Checkpoint | None) -> Checkpoint:
        """Counts that a run goes back from `bad` to a checkpoint, if there is one, and returns it.

        Afterwards `already_left_out` says how many batches after it were left out before.

        Raises:
            DivergedError: on every rank, if there is none, or the run has gone back too often.
        """
        if to is None:
            raise DivergedError(
                f"{bad}, and there is no checkpoint to go back to. The run stops. Save earlier (--checkpoint.every), "
                "or see whether the run is stable at all: a lower --optimizer.lr usually helps."
            )
        if self._state.rewinds >= self._config.max_rewinds:
            raise DivergedError(
                f"{bad}, and the run has gone back {self._state.rewinds} times already (guard.max_rewinds). It stops "
                "without saving. A lower --optimizer.lr usually helps."
            )
        self._verdicts.clear()
        self._state = self._state._replace(rewinds=self._state.rewinds + 1)
        if self._went_back_to != to.step:
            self._went_back_to, self._left_out = to.step, 0
        self._env.say(
            f"{bad}: going back to step {to.step}, and on without the batches up to the bad one; {SKIPPED} names their "
            "samples."
        )
        return to

    @property
    def already_left_out(self) -> int:
        """How many batches after the checkpoint that the run went back to last it had left out before."""
        return self._left_out

    def leave_out(self, number: int, sample_ids: Tensor) -> None:
        """Writes down that the batch of what was step `number` is not trained on; `sample_ids`: this rank's rows."""
        self._left_out += 1
        self._write(number, sample_ids)

    def resume(self, step: int) -> None:
        """The process begins after `step`: what was written of later steps will be written again."""
        self._env.main_only(lambda: resume_jsonl(self._directory / SKIPPED, step))

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
        """The last good losses, and what was counted."""
        counts = {name: torch.tensor(count) for name, count in self._state._asdict().items()}
        return {**self._judge.state_dict(), **counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a state; what this process knows of going back is not forgotten."""
        counts = {name: int(state[name]) for name in _State._fields}
        self._judge.load_state_dict({name: tensor for name, tensor in state.items() if name not in counts})
        self._state = _State(**counts | {"rewinds": max(self._state.rewinds, counts["rewinds"])})
