"""The story of a run: build, restore, loop.

A model is built on the meta device, laid out, given memory and weights, and an optimizer; then the newest checkpoint,
if there is one, is read into them. Each step reads its rows of a global batch, accumulates the gradients of the mean
loss over that batch's tokens, clips them and steps. Whatever decides how a run goes on follows from numbers that all
ranks share.
"""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_ckpt.checkpointer import Checkpointer
from titan_core.init import init_parameters, materialize
from titan_core.optim import ModelState, OptimizerState, build_optimizer
from titan_core.rng import RngState
from titan_data.dataset import TokenDataset, open_dataset
from titan_data.loader import Batch, BatchLoader
from titan_quant.device import nvidia_capability
from titan_quant.recipes import resolve_recipe
from titan_train import report
from titan_train.build import input_names, lay_out, update
from titan_train.config import TrainConfig
from titan_train.config_file import to_json
from titan_train.environment import Environment, environment
from titan_train.hooks import Hook, Step, build_hooks
from titan_train.interrupt import Interrupt
from titan_train.parts import fingerprint, what_of
from titan_train.resume import Progress, find_checkpoint
from titan_train.rows import share_rows
from titan_train.run_directory import RunDirectory, default_directory
from titan_train.status import StatusFile
from titan_train.validate import check_vocabulary

IGNORED = -100  # the label of a token without loss


class DivergedError(RuntimeError):
    """The loss or its gradient is not finite; going on or saving would only do harm."""


def train(config: TrainConfig, interrupt: Interrupt, *, name: str) -> signal.Signals | None:
    """Trains as a validated `config` says, on from where its run directory left off.

    `name` names the run directory if the configuration does not.

    Returns:
        The signal by which the run was ended, after saving; None if it is finished.
    """
    with environment(config) as env, contextlib.ExitStack() as cleanup:
        path = env.on_main(lambda: Path(config.output) if config.output else default_directory(name))
        config = dataclasses.replace(config, output=str(path))
        directory = RunDirectory(path)
        env.on_main(directory.claim)
        cleanup.callback(directory.release)
        status = cleanup.enter_context(StatusFile(path)) if env.is_main else None
        dataset = open_dataset(config.data, progress=env.say)
        check_vocabulary(config, dataset.vocab_size)

        what = what_of(config, dataset.fingerprint)
        checkpointer = Checkpointer(
            path / "checkpoints",
            keep_latest=config.checkpoint.keep_latest,
            verify_hashes=config.checkpoint.verify_hashes,
            report=env.say,
        )
        checkpoint = find_checkpoint(config, env, checkpointer, what)
        if checkpoint is not None and checkpoint.step >= config.training.steps:
            env.say(report.already_finished(config, checkpoint.step))
            if status:
                status.end(checkpoint.step, by=None)
            return None
        env.on_main(lambda: directory.write_config(config))

        trainer = Trainer(config, env, dataset, what)
        if checkpoint is not None:
            checkpointer.load(checkpoint, trainer.state, per_rank=trainer.per_rank_state)
            env.say(f"Resumed from {checkpoint.path}, after step {checkpoint.step}.")
        hooks = build_hooks(config, env, checkpoint)
        for hook in hooks:
            cleanup.callback(hook.close)
        ended_by = trainer.run(checkpointer, hooks, interrupt)
        if status:
            status.end(trainer.progress.step, ended_by)
        return ended_by


class Trainer:
    """A built run: model, optimizer, data and counters, and the loop over them."""

    def __init__(self, config: TrainConfig, env: Environment, dataset: TokenDataset, what: dict[str, Any]) -> None:
        self.config, self.env, self.dataset, self.what = config, env, dataset, what
        resolve_recipe(config.quant.recipe, nvidia_capability(env.device.type), env.device.type)
        self.layout, roles = lay_out(config, env)
        share = share_rows(config.training, config.parallel, env.degrees)
        self.model = self.layout.model
        host = torch.device("cpu") if config.parallel.cpu_offload else None
        materialize(self.model, env.device, parameters=host)
        init_parameters(self.model, config.model.init_rules(), config.training.seed)
        self.optimizer = build_optimizer(self.model, roles, config.optimizer)

        self.loader = BatchLoader(
            dataset,
            seq_len=config.training.seq_len,
            global_batch_size=config.training.global_batch_size,
            seed=config.training.seed,
            shuffle=config.data.shuffle,
            confine_attention=config.data.confine_attention,
            rank=env.data_rank,
            rows=share.rows,
            prefetch=config.data.prefetch,
        )
        self.progress = Progress()
        self.state = {
            "model": ModelState(self.model),
            "optimizer": OptimizerState(self.optimizer, self.model),
            "data": self.loader,
            "progress": self.progress,
        }
        self.per_rank_state = {"rng": RngState()}
        env.say(
            report.overview(
                config,
                env.degrees,
                device=env.device_name(),
                data=dataset.describe(),
                share=share,
                gradient_bytes=self.layout.gradient_bytes(),
            )
        )

    def run(self, checkpointer: Checkpointer, hooks: Sequence[Hook], interrupt: Interrupt) -> signal.Signals | None:
        """Steps until `training.steps` or an interrupt, saving on the way; returns the signal that has ended it."""
        total, every = self.config.training.steps, self.config.checkpoint.every
        started_at, started = self.progress.step, time.perf_counter()
        with interrupt.deferred(), contextlib.closing(self.loader):
            ended_by = interrupt.decision(self.env.agree(interrupt.votes))  # it may have come while the run started
            while ended_by is None and self.progress.step < total:
                step = self.step(interrupt.votes)
                ended_by = step.ended_by
                for hook in hooks:
                    hook.end_step(step)
                if self.config.checkpoint.enabled and (step.is_last or (every and step.number % every == 0)):
                    self._refuse_divergence(step)
                    self.save(checkpointer, hooks)
        if self.progress.step >= total:
            ended_by = None
        steps, seconds = self.progress.step - started_at, time.perf_counter() - started
        self.env.say(report.ending(self.config, self.progress.step, steps, seconds))
        return ended_by

    def step(self, votes: Sequence[int] = (0, 0)) -> Step:
        """One optimizer step on the next global batch; with `Interrupt.votes` a rank asks all to end with it."""
        number = self.progress.step + 1
        waiting = time.perf_counter()
        batch = next(self.loader)
        waited = time.perf_counter() - waiting
        # One small exchange carries all that ranks must agree on before the step.
        own_valid = int((batch["labels"] != IGNORED).sum()) if self.env.reads_first else 0
        valid, *votes = self.env.agree([own_valid, *votes])
        ended_by = Interrupt.decision(votes)

        loss = self.layout.accumulate(self._inputs(batch, valid), divisor=max(valid, 1))
        grad_norm, lr = update(self.layout, self.optimizer, self.config, number, self.env.stages)
        tokens = self.config.training.global_batch_size * self.config.training.seq_len
        self.progress.advance(tokens)
        return Step(
            number=number,
            is_last=number >= self.config.training.steps or ended_by is not None,
            ended_by=ended_by,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            tokens=tokens,
            total_tokens=self.progress.tokens,
            epoch=self.loader.epoch,
            data_wait_seconds=waited,
            sample_ids=batch["sample_ids"],
            expert_loads=self.layout.routers.loads,
        )

    def _inputs(self, batch: Batch, valid: int) -> dict[str, Tensor]:
        """What the model reads of a batch, on its device; `valid` tokens of the global batch carry loss."""
        inputs = {name: batch[name] for name in input_names(self.config)}
        if self.config.model.moe is not None:
            # Each row's share of the mean loss, by which its auxiliary losses count.
            inputs["row_weights"] = (batch["labels"] != IGNORED).sum(1, dtype=torch.float64) / max(valid, 1)
        return {name: tensor.to(self.env.device, non_blocking=True) for name, tensor in inputs.items()}

    def _refuse_divergence(self, step: Step) -> None:
        """Raises `DivergedError` on all ranks if the step's loss or gradient is not finite."""
        loss, norm = self.env.sum_loss(step.loss.clone()).item(), step.grad_norm.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(
                f"The loss is {loss} and the gradient norm {norm} at step {step.number}. The run has diverged and "
                "stops without saving, so that earlier checkpoints stay. See metrics.jsonl for the first such line; "
                "a lower --optimizer.lr or a longer --schedule.warmup-steps usually helps."
            )

    def save(self, checkpointer: Checkpointer, hooks: Sequence[Hook]) -> None:
        """Writes a checkpoint of the state after the last step, with all that a model needs to be used alone."""
        meta = {"fingerprint": fingerprint(self.what), "what": self.what, "tokens": self.progress.tokens}
        for hook in hooks:
            meta |= hook.checkpoint_meta()
        files = {"config.json": to_json(self.config).encode(), "model.json": to_json(self.config.model).encode()}
        folder = checkpointer.save(
            self.progress.step,
            self.state,
            per_rank=self.per_rank_state,
            meta=meta,
            files=files | dict(self.dataset.tokenizer.files),
        )
        self.env.say(f"Saved {folder}")
