"""Validation while a run trains: loss, perplexity and bits per byte of each set, with the weights as they are.

Every row of a set counts once, whatever the layout: all ranks run equally many batches, filled up with rows without
labels, and what they have found is summed.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from titan_core.layout import Layout
from titan_data.rows import IGNORED_LABEL
from titan_data.validation import ValidationSet
from titan_train.build import full_share, model_inputs
from titan_train.config import TrainConfig
from titan_train.environment import Environment
from titan_train.hooks import Hook, LogMetrics, Step
from titan_train.recorder import Recorder


@dataclass(frozen=True)
class Score:
    """How well a model predicts a set."""

    loss: float
    """Nats a token, the mean over all labels."""
    bits_per_byte: float
    """Bits paid for each byte of text, whatever the tokenizer; NaN where no label stands for text."""

    @property
    def perplexity(self) -> float:
        """E to the loss; infinite where that is too large for a number."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


class Validate(Hook):
    """Validates every so many steps and after the last one, and logs what it finds with that step."""

    def __init__(
        self,
        config: TrainConfig,
        env: Environment,
        layout: Layout,
        sets: Sequence[ValidationSet],
        log: LogMetrics,
        record: Recorder,
    ) -> None:
        self._config, self._env, self._layout, self._sets, self._log = config, env, layout, sets, log
        self._record = record

    def end_step(self, step: Step) -> None:
        """Validates if it is time; all ranks take part."""
        finished = step.number >= self._config.training.steps
        if not (finished or step.number % self._config.validation.every == 0):
            return
        with self._record.aside("validation", "validate", step.number):
            self._score_all(step)

    def _score_all(self, step: Step) -> None:
        for each in self._sets:
            score = self.score(each)
            self._env.say(
                f"Validation {each.name} after step {step.number}: loss {score.loss:.4f}, perplexity "
                f"{score.perplexity:.2f}, {score.bits_per_byte:.4f} bits per byte"
            )
            values = dataclasses.asdict(score) | {"perplexity": score.perplexity}
            self._log.add({f"validation.{each.name}.{name}": value for name, value in values.items()})

    def score(self, rows: ValidationSet) -> Score:
        """Runs the model over a set."""
        env = self._env
        share = full_share(self._config, env.degrees)
        loss = torch.zeros((), dtype=torch.float64, device=env.device)
        labels, text_bytes = 0, 0
        for batch in rows.batches(rows=share.rows, rank=env.data_rank, ranks=env.degrees.dp):
            loss += self._layout.evaluate(model_inputs(self._config, batch, env.device))
            if env.reads_first:
                labels += int((batch["labels"] != IGNORED_LABEL).sum())
                text_bytes += rows.count_bytes(batch["labels"])
        nats = env.sum_loss(loss).item()
        labels, text_bytes = env.agree([labels, text_bytes])
        return Score(
            loss=nats / labels if labels else math.nan,
            bits_per_byte=nats / math.log(2) / text_bytes if text_bytes else math.nan,
        )
