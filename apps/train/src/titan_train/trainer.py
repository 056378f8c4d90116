"""The story of a run: build, restore, loop.

A model is built on the meta device, laid out, given memory and weights, and an optimizer; then the newest checkpoint,
if there is one, is read into them. Each step reads its rows of a global batch, accumulates the gradients of the mean
loss over that batch's tokens, clips them and steps. Whatever decides how a run goes on follows from numbers that all
ranks share.
"""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from titan_ckpt.cadence import Timer, due
from titan_ckpt.checkpoint import Checkpoint
from titan_ckpt.checkpointer import Checkpointer
from titan_ckpt.place import Place
from titan_core.optim import ModelState, OptimizerState, build_optimizer
from titan_core.optimizers.convert_state import ConvertedState
from titan_core.replicas.averaging import Averaging
from titan_core.replicas.groups import StepDiscardedError
from titan_core.rng import RngState
from titan_data.loader import Batch
from titan_data.rows import IGNORED_LABEL
from titan_data.validation import ValidationSet
from titan_models import model_file
from titan_quant.device import nvidia_capability
from titan_quant.recipes import resolve_recipe
from titan_train import report
from titan_train.build import full_share, lay_out, model_inputs
from titan_train.config import TrainConfig
from titan_train.config_file import RUN_CONFIG, to_json
from titan_train.data import (
    Dataset,
    Loader,
    build_loader,
    epochs_by_source,
    open_data,
    open_validation,
    tokenizer_files,
)
from titan_train.environment import Environment, environment
from titan_train.evaluation import Evaluate
from titan_train.export import export, is_exported
from titan_train.guard import BadStep, Guard
from titan_train.hooks import Hook, LogSamples, Step, build_log
from titan_train.interrupt import Interrupt
from titan_train.origin import Origin, find_origin
from titan_train.own_hooks import find_hooks, open_hooks
from titan_train.parts import fingerprint, what_of
from titan_train.recorder import Recorder
from titan_train.replicas import (
    Alone,
    Apart,
    Deal,
    Saving,
    Together,
    claim,
    open_groups,
    write_configs,
)
from titan_train.resume import Progress, already_excluded, find_checkpoint, saved_state_dtype
from titan_train.rows import share_rows
from titan_train.run_directory import checkpoint_directory, default_directory, own_folder
from titan_train.status import StatusFile
from titan_train.validate import check_vocabulary
from titan_train.validation import Validate
from titan_train.votes import Votes
from titan_train.weights import load_weights


def train(config: TrainConfig, interrupt: Interrupt, *, name: str) -> signal.Signals | None:
    """Trains as a validated `config` says, on from where its run directory left off.

    `name` names the run directory if the configuration does not.

    Returns:
        The signal by which the run was ended, after saving; None if it is finished.
    """
    with environment(config) as env, contextlib.ExitStack() as cleanup:
        path = env.on_main(lambda: Path(config.output) if config.output else default_directory(name))
        config = dataclasses.replace(config, output=str(path))
        shared = claim(config, env, cleanup)
        status = cleanup.enter_context(StatusFile(own_folder(config))) if env.is_main else None

        def progress(text: str) -> None:
            interrupt.check()
            env.say(text)

        find_hooks(config.hooks)  # a name that is wrong is said before anything is read or built
        interrupt.check()
        dataset = open_data(config, progress=progress)
        check_vocabulary(config, dataset.vocab_size)
        validation_sets = open_validation(config, dataset, progress=progress)

        what = what_of(config, dataset.fingerprint)
        checkpointer = Checkpointer(
            checkpoint_directory(config),
            keep_latest=config.checkpoint.keep_latest,
            verify_hashes=config.checkpoint.verify_hashes,
            asynchronous=config.checkpoint.enabled and config.checkpoint.asynchronous,
            report=env.say,
        )
        cleanup.callback(checkpointer.close)
        checkpoint = find_checkpoint(config, env, checkpointer, what)
        interrupt.check()
        if checkpoint is not None and checkpoint.step >= config.training.steps:
            if config.export.format != "none" and not env.on_main(lambda: is_exported(config, checkpoint.place)):
                _export(config, env, checkpoint.place, dataset)
            env.say(report.already_finished(config, checkpoint.step))
            if status:
                status.end(checkpoint.step, by=None)
            return None
        env.on_main(lambda: write_configs(config))
        record = cleanup.enter_context(Recorder(config, env))

        trainer = Trainer(config, env, dataset, what, record)
        interrupt.check()
        if checkpoint is not None:
            with record.aside("restore", "restore", checkpoint.step):
                trainer.resume(checkpointer, checkpoint)
        elif config.checkpoint.init_from is not None:
            trainer.start_from(find_origin(config.checkpoint.init_from))
        trainer.join(cleanup, Saving(config, env, shared, checkpointer))
        trainer.guard.resume(trainer.progress.step)
        record.ready(trainer.model, trainer.progress.step)
        if config.spans.enabled:
            trainer.layout.watch(record.spans.action)
        while True:
            with contextlib.ExitStack() as hooked:
                hooks = build_hooks(trainer, validation_sets, checkpoint)
                for hook in hooks:
                    hooked.callback(hook.close)
                ended_by = trainer.run(checkpointer, hooks, interrupt)
            if not isinstance(ended_by, BadStep):
                break
            checkpoint = trainer.go_back(checkpointer, ended_by)
        if status:
            status.end(trainer.progress.step, ended_by)
        return ended_by


def _export(config: TrainConfig, env: Environment, checkpoint: Place, dataset: Dataset) -> Path:
    files, eos_id = tokenizer_files(dataset), dataset.tokenizer.eos_id
    folder = export(config, checkpoint, tokenizer=files, eos_id=eos_id)
    env.say(f"Exported {folder}")
    return folder


def build_hooks(trainer: "Trainer", sets: Sequence[ValidationSet], checkpoint: Checkpoint | None) -> list[Hook]:
    """What the configuration asks for beside training, in the order of its doing; `checkpoint` is gone on from."""
    config, env = trainer.config, trainer.env
    log = build_log(config, env, checkpoint, trainer.progress.step, trainer.laid_out.rewrites, trainer.record)
    hooks: list[Hook] = [Validate(config, env, trainer.layout, sets, log, trainer.record)] if sets else []
    hooks += [*open_hooks(config.hooks, trainer, log), log]
    if config.training.log_samples and env.reads_first:
        hooks.append(LogSamples(own_folder(config), env.data_rank))
    if config.evaluation.command and env.is_main:
        hooks.append(Evaluate(config.evaluation, env, Path(config.output or ""), log))
    return hooks


class Trainer:
    """A built run: model, optimizer, data and counters, and the loop over them."""

    def __init__(
        self, config: TrainConfig, env: Environment, dataset: Dataset, what: dict[str, Any], record: Recorder
    ) -> None:
        self.config, self.env, self.dataset, self.what, self.record = config, env, dataset, what, record
        capability = nvidia_capability(env.device.type)
        resolve_recipe(config.quant.recipe, capability, env.device.type, emulate=config.quant.emulate)
        self.laid_out = lay_out(config, env)
        self.layout = self.laid_out.layout
        self.model = self.layout.model
        host = torch.device("cpu") if config.parallel.cpu_offload else None
        self.laid_out.give_memory(env.device, parameters=host)
        self.laid_out.init()
        self.optimizer = build_optimizer(self.model, self.laid_out.roles, config.optimizer, seed=config.training.seed)

        self.replicas = Alone()
        self.deal = Deal(0, config.replica.groups)
        self.loader = self._open_loader()
        self.progress = Progress()
        self.guard = Guard(config.guard, env, own_folder(config))
        self.state: dict[str, Any] = {
            "model": ModelState(self.model),
            "optimizer": OptimizerState(self.optimizer, self.model),
            "data": self.loader,
            "guard": self.guard,
            "progress": self.progress,
        }
        self.averaging = self._averaging() if config.replica.averaging.method != "none" else None
        if self.averaging is not None:
            self.state["averaging"] = self.averaging
        self.per_rank_state = {"rng": RngState()}
        self.excluded: set[str] = set()  # parts that this run has left out when it resumed
        env.say(
            report.overview(
                config,
                env.degrees,
                device=env.device_name(),
                data=dataset.describe(),
                share=full_share(config, env.degrees),
                gradient_bytes=self.layout.gradient_bytes(),
                rewrites=self.laid_out.rewrites.describe(config),
            )
        )

    def _averaging(self) -> Averaging:
        return Averaging(
            self.model,
            self.config.replica.averaging,
            self.laid_out.sizes,
            step=lambda: self.progress.step,
            moments=self.state["optimizer"],
        )

    def _open_loader(self) -> Loader:
        """Reads this group's part of each global batch, as it is dealt now."""
        config, degrees = self.config, self.env.degrees
        rows = share_rows(config.training, config.parallel, degrees, groups=self.deal.parts).rows
        if degrees.pp > 1:  # whose schedule is for so many rows at a time
            full = full_share(config, degrees).rows
            rows = -(-rows // full) * full
        rank = self.deal.part * degrees.dp + self.env.data_rank
        return build_loader(config, self.dataset, rank=rank, rows=rows, on_gpu=self.env.device.type == "cuda")

    def join(self, cleanup: contextlib.ExitStack, saving: Saving) -> None:
        """Joins the other replica groups, if there may be any, and begins a step; heals if this one is behind.

        `cleanup` leaves them at the end.

        Raises:
            ReplicaError: if that cannot be.
        """
        config, replica = self.config, self.config.replica
        if not replica.enabled:
            return
        self.state["optimizer"].state_dict()  # creates what does not exist yet, which may take all ranks
        healing = self.state
        if self.averaging is not None:
            healing = {name: self.state[name] for name in ("model", "averaging", "data", "progress")}
        groups = cleanup.enter_context(open_groups(config, self.env, self.what, healing, self.averaging))
        if self.averaging is None:
            self.replicas = Together(groups, self.laid_out, self.env, saving, timeout=replica.timeout_seconds)
        else:
            self.replicas = Apart(groups, self.averaging, Deal(replica.group, replica.groups))
        self._begin()
        how = f"healed to step {self.progress.step}" if groups.healed else f"after step {self.progress.step}"
        self.env.say(f"Group {replica.group} trains with {groups.number} of {replica.groups} groups, {how}.")

    def _begin(self) -> None:
        """Begins a step with the replica groups that are there."""
        self.replicas.begin()
        if self.replicas.deal != self.deal:
            self.deal, before = self.replicas.deal, self.loader
            self.loader = self.state["data"] = self._open_loader()
            self.loader.load_state_dict(before.state_dict())
            before.close()
        self._follow_weights()

    def _follow_weights(self) -> None:
        if self.replicas.moved:
            self.laid_out.follow_weights()
            self.replicas.moved = False

    def resume(self, checkpointer: Checkpointer, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint of this run, without the parts that are excluded, once."""
        left_out = set(self.config.checkpoint.exclude) - already_excluded(checkpoint)
        state: dict[str, Any] = {name: part for name, part in self.state.items() if name not in left_out}
        saved, now = saved_state_dtype(checkpoint), self.config.optimizer.state_dtype
        if saved != now and "optimizer" in state:  # one of the changes that were allowed
            state["optimizer"] = ConvertedState(self.optimizer, self.model, saved=saved, now=now)
        own = {name: part for name, part in self.per_rank_state.items() if name not in left_out}
        checkpointer.load(checkpoint, state, per_rank=own, skip=left_out)
        self.excluded = already_excluded(checkpoint) | left_out
        without = f", without {' and '.join(sorted(left_out))}" if left_out else ""
        self.env.say(f"Resumed from {checkpoint.place}, after step {checkpoint.step}{without}.")

    def start_from(self, origin: Origin) -> None:
        """Takes over weights, and nothing else."""
        load_weights(self.model, origin, verify_hashes=self.config.checkpoint.verify_hashes)
        self.env.say(f"Started from the weights in {origin.place}.")

    def go_back(self, checkpointer: Checkpointer, bad: BadStep) -> Checkpoint:
        """Returns to the newest checkpoint, with the batch after the `bad` step next."""
        checkpointer.wait()
        checkpoint = self.guard.go_back(bad, checkpointer.newest_whole())
        with self.record.aside("restore", "restore", checkpoint.step), contextlib.closing(self.loader):
            self.resume(checkpointer, checkpoint)
            for _ in range(self.guard.already_left_out):
                next(self.loader)
            for number in range(checkpoint.step + 1, bad.number + 1):
                self.guard.leave_out(number, next(self.loader)["sample_ids"])
        return checkpoint

    def run(
        self, checkpointer: Checkpointer, hooks: Sequence[Hook], interrupt: Interrupt
    ) -> signal.Signals | BadStep | None:
        """Steps until `training.steps`, an interrupt or a step to go back from, saving on the way; says what ended it.

        Raises:
            DivergedError: if a step diverges, and the configuration does not say how to go on.
        """
        total, timer = self.config.training.steps, Timer(self.config.checkpoint)
        started_at, started = self.progress.step, time.perf_counter()
        with interrupt.deferred(), contextlib.ExitStack() as reading:
            reading.callback(lambda: self.loader.close())  # which may be another one by then
            ended_by = Votes(*self.env.agree(interrupt.vote)).ended_by  # it may have come while the run started
            while ended_by is None and self.progress.step < total:
                vote = interrupt.vote._replace(
                    save=int(self.env.is_main and timer.is_time()),
                    save_failed=int(checkpointer.failed),
                    bad_step=int(self.guard.noticed()),
                )
                step = self.step(vote)
                ended_by = step.votes.ended_by
                for hook in hooks:
                    hook.end_step(step)
                self.record.end_step(step.number)
                if step.votes.save_failed:
                    checkpointer.wait()  # raises on all ranks
                kind = due(self.config.checkpoint, step.number, is_last=step.is_last, is_time=step.votes.save > 0)
                exports = self.replicas.exports and self.config.export.due(
                    step.number, is_last=step.is_last and step.votes.ended_by is None
                )
                saves = kind is not None or exports
                if (step.votes.bad_step or step.is_last or saves) and (bad := self.guard.settle()) is not None:
                    return bad
                if saves:
                    if self.replicas.saves(must=step.is_last):
                        self.save(checkpointer, hooks, permanent=kind == "permanent", exports=exports)
                    timer.restart()
            checkpointer.wait()
        if self.progress.step >= total:
            ended_by = None
            for hook in hooks:
                hook.end_run()
        steps, seconds = self.progress.step - started_at, time.perf_counter() - started
        self.env.say(report.ending(self.config, self.progress.step, steps, seconds))
        return ended_by

    def step(self, vote: Votes) -> Step:
        """One optimizer step on the next global batch; `vote` is what this rank has to say to the others before it."""
        step = None
        while step is None:  # a replica group has gone: the same batch again, among those that are left
            step = self._try_step(vote)
        return step

    def _try_step(self, vote: Votes) -> Step | None:
        self._begin()
        number = self.progress.step + 1
        self.record.begin_step(number)
        span, before = self.record.spans.span, self.loader.state_dict()
        waiting = time.perf_counter()
        with span("data_wait"):
            batch = next(self.loader)
        waited = time.perf_counter() - waiting
        with span("agreement"):
            # One small exchange carries all that ranks must agree on before the step.
            own_valid, own_seen = _counts(batch)
            mine = [own_valid, own_seen] if self.env.reads_first else [0, 0]
            valid, seen, *sums = self.env.agree([*mine, *vote])
            votes = Votes(*sums)
            try:
                valid, seen, save, bad_step = self.replicas.agree([valid, seen, votes.save, votes.bad_step])
            except StepDiscardedError:
                return self._undo(before)
            votes = votes._replace(save=save, bad_step=bad_step)

        with span("forward_backward"):
            loss = self._accumulate(self._inputs(batch, valid), max(valid, 1))
        self.record.after_backward()
        if (shared := self.replicas.commit(loss, own_valid)) is None:
            return self._undo(before)
        loss, own_valid = shared

        def judge(grad_norm: Tensor) -> Tensor:
            return self.guard.judge(number, self.env.sum_loss(loss.detach().clone()), grad_norm, batch["sample_ids"])

        with self.record.update(number):
            grad_norm, lr = self.laid_out.update(self.optimizer, number, self.env.stages, judge)
        tokens = self.config.training.global_batch_size * self.config.training.seq_len
        self.progress.advance(tokens)
        self.replicas.end_step()
        self._follow_weights()
        return Step(
            number=number,
            is_last=number >= self.config.training.steps or votes.ended_by is not None,
            votes=votes,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            lrs=_group_lrs(self.optimizer),
            own_share=own_valid / max(valid, 1),
            seen_tokens=self.replicas.of_all(seen),
            tokens=tokens,
            total_tokens=self.progress.tokens,
            epoch=self.loader.epoch,
            epochs=epochs_by_source(self.loader),
            data_wait_seconds=waited,
            sample_ids=batch["sample_ids"],
            expert_loads=self.layout.routers.loads,
            replicas=self.replicas.readings(),
        )

    def _accumulate(self, inputs: dict[str, Tensor], valid: int) -> Tensor:
        """Adds up gradients of this rank's rows: with a pipeline, as many at a time as its schedule is for."""
        if self.env.degrees.pp == 1:
            return self.layout.accumulate(inputs, divisor=valid)
        rounds = {name: rows.split(full_share(self.config, self.env.degrees).rows) for name, rows in inputs.items()}
        parts = [dict(zip(rounds, part, strict=True)) for part in zip(*rounds.values(), strict=True)]
        return torch.stack([self.layout.accumulate(part, divisor=valid) for part in parts]).sum()

    def _undo(self, before: dict[str, Any]) -> None:
        """Forgets a step that was not taken; `before` is where its batch was read."""
        self.optimizer.zero_grad()
        for counts in self.layout.routers.counts:
            counts.zero_()
        self.loader.load_state_dict(before)

    def _inputs(self, batch: Batch, valid: int) -> dict[str, Tensor]:
        """What the model reads of a batch, on its device; `valid` tokens of the global batch carry loss."""
        inputs = model_inputs(self.config, batch, self.env.device)
        if self.config.model.moe is not None:
            # Each row's share of the mean loss, by which its auxiliary losses count.
            weights = (batch["labels"] != IGNORED_LABEL).sum(1, dtype=torch.float64) / max(valid, 1)
            inputs["row_weights"] = weights.to(self.env.device)
        return inputs

    def save(self, checkpointer: Checkpointer, hooks: Sequence[Hook], *, permanent: bool, exports: bool) -> None:
        """Saves the state after the last step, or begins to, with all that a model needs to be used alone.

        Args:
            checkpointer: of the run.
            hooks: have something to remember, and are told what it took.
            permanent: keep it for good.
            exports: wait until it is saved, and write its weights in the format that the configuration asks for.
        """
        meta: dict[str, Any] = {
            "fingerprint": fingerprint(self.what),
            "what": self.what,
            "tokens": self.progress.tokens,
            "excluded": sorted(self.excluded),
        }
        for hook in hooks:
            meta |= hook.checkpoint_meta()
        files = {
            RUN_CONFIG: to_json(self.config).encode(),
            model_file.MODEL_FILE: model_file.to_json(self.config.model).encode(),
        }
        started, step = time.perf_counter(), self.progress.step
        with self.record.aside("checkpoint", "save", step):
            exported = self._save(checkpointer, files, meta, permanent=permanent, exports=exports)
        for hook in hooks:
            hook.end_save(time.perf_counter() - started)
            if exported is not None:
                hook.end_export(step, exported)

    def _save(
        self,
        checkpointer: Checkpointer,
        files: dict[str, bytes],
        meta: dict[str, Any],
        *,
        permanent: bool,
        exports: bool,
    ) -> Path | None:
        step = self.progress.step
        contents: dict[str, Any] = {
            "per_rank": self.per_rank_state,
            "meta": meta,
            "files": files | tokenizer_files(self.dataset),
            "permanent": permanent,
        }
        if self.config.checkpoint.asynchronous and not exports:
            checkpointer.start_save(step, self.state, **contents)
            self.env.say(f"Saving step {step} to {checkpointer.directory}")
        else:
            checkpoint = checkpointer.save(step, self.state, **contents)
            self.env.say(f"Saved {checkpoint}")
            return _export(self.config, self.env, checkpoint, self.dataset) if exports else None
        return None


def _counts(batch: Batch) -> tuple[int, int]:
    """Labels that carry loss, and tokens that all tokens see together: each its document's up to itself."""
    rows = batch["sample_ids"] >= 0
    return int((batch["labels"] != IGNORED_LABEL).sum()), int((batch["positions"][rows] + 1).sum())


def _group_lrs(optimizer: Optimizer) -> dict[str, float]:
    """Number of each group -> its learning rate, if they differ."""
    lrs = [group["lr"] for group in optimizer.param_groups]
    return {str(i): lr for i, lr in enumerate(lrs)} if len(set(lrs)) > 1 else {}
