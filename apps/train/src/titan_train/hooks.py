"""What a run may do beside training, as objects that the loop calls at named moments."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from titan_ckpt.checkpoint import Checkpoint
from titan_metrics.accumulator import DeferredLog, Reading
from titan_metrics.jsonl import JsonlSink, resume_jsonl
from titan_metrics.memory import memory
from titan_metrics.meter import Meter
from titan_metrics.peaks import mixed_peak
from titan_metrics.sinks import Sinks, build_sinks
from titan_models.facts import training_flops_per_token
from titan_train.config import TrainConfig
from titan_train.environment import Environment
from titan_train.recorder import Recorder
from titan_train.rewrites import Rewrites
from titan_train.run_directory import own_folder
from titan_train.votes import Votes


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the loop knows at the end of a step. Tensors are on the device; reading one waits for it."""

    number: int
    """The step, counted from 1."""
    is_last: bool
    """Whether the run ends or is interrupted with this step."""
    votes: Votes
    """What the ranks have decided before it."""
    loss: Tensor
    """This rank's share of the mean loss over the global batch's tokens: a scalar."""
    grad_norm: Tensor
    """Global norm of the gradients before clipping: a scalar."""
    lr: float
    """Learning rate of the step."""
    lrs: Mapping[str, float]
    """Number of each of the optimizer's groups -> its learning rate, if they differ."""
    own_share: float
    """This data-parallel rank's labels, as a share of those of the global batch."""
    tokens: int
    """Tokens in the step's global batch."""
    seen_tokens: int
    """How many tokens each of them sees, itself included: the sum over the global batch."""
    total_tokens: int
    """Tokens in all steps so far."""
    epoch: float
    """How often the data has been read."""
    epochs: Mapping[str, float]
    """Name of each source -> how often it has been read, if there are several."""
    data_wait_seconds: float
    """Time this rank waited for its batch."""
    sample_ids: Tensor
    """The rows of the data this rank read: int64 [rows], -1 for padding."""
    expert_loads: Mapping[str, Tensor]
    """FQN of each router on this rank -> tokens that it sent to each expert, over the global batch: [E]."""
    replicas: Mapping[str, float]
    """What is to be logged of replica groups, if there are several."""


class Hook:
    """Does nothing at each of the loop's moments; a hook overrides those it cares for. Called on every rank alike."""

    def end_step(self, step: Step) -> None:
        """After the optimizer has stepped."""

    def end_save(self, blocking_seconds: float) -> None:
        """After a checkpoint was saved, or copied to be saved, which training waited for."""

    def end_export(self, step: int, folder: Path) -> None:
        """After the weights of `step` were exported to a folder."""

    def end_run(self) -> None:
        """When the last step is done and all is saved; not if the run is interrupted."""

    def checkpoint_meta(self) -> dict[str, Any]:
        """JSON values to be found again in a checkpoint; rank 0's count."""
        return {}

    def close(self) -> None:
        """When the run ends, however it ends."""


class LogMetrics(Hook):
    """Logs the first, the last and every n-th step; rank 0 has the sinks, the others help to add up.

    Tensors are not waited for: a line is written when the device has delivered its numbers, or with the next one.
    """

    def __init__(
        self,
        config: TrainConfig,
        env: Environment,
        meter: Meter,
        sinks: Sinks | None,
        loads: Sinks | None,
        record: Recorder,
    ) -> None:
        self._env, self._meter, self._sinks, self._loads, self._record = env, meter, sinks, loads, record
        self._log = DeferredLog(sinks) if sinks is not None else None
        self._every = config.metrics.log_every
        model, seq_len = config.model, config.training.seq_len
        self._flops, one_more = (training_flops_per_token(model, seq_len, seen=seen) for seen in (0.0, 1.0))
        self._flops_per_seen = one_more - self._flops
        self._first: int | None = None
        self._saving_seconds = 0.0
        record.take_aside_seconds()  # those before the first step are no part of what the meter measures
        self._added: dict[str, float] = {}
        self._attached: dict[str, float] = {}

    def end_step(self, step: Step) -> None:
        """Collects what is to be logged of the step, if it is."""
        flops = step.tokens * self._flops + step.seen_tokens * self._flops_per_seen
        self._meter.add(tokens=step.tokens, data_wait_seconds=step.data_wait_seconds, flops=flops)
        first = self._first is None
        self._first = step.number if first else self._first
        norms = self._record.take_norms()
        if not (first or step.is_last or self._added or norms or step.number % self._every == 0):
            return
        values: dict[str, float | int | str] = {
            "lr": step.lr,
            **{f"lr.{name}": lr for name, lr in step.lrs.items()},
            "tokens": step.total_tokens,
            "epoch": step.epoch,
            **{f"epoch.{name}": epoch for name, epoch in step.epochs.items()},
            "checkpoint_seconds": self._saving_seconds,
            **step.replicas,
        }
        self._saving_seconds = 0.0
        values |= self._expert_loads(step) | self._added | self._attached
        self._added, self._attached = {}, {}
        numbers = self._loss(step)
        phases = self._record.spans.read()
        self._meter.leave_out(self._record.take_aside_seconds())
        values |= self._meter.read() | phases | memory(self._env.device.type)
        worked = phases.get("time.forward_backward", 0.0) + phases.get("time.optimizer", 0.0)
        self._record.record("step", step=step.number, seconds=worked)
        self._record.record("data", step=step.number, seconds=phases.get("time.data_wait", 0.0))
        if self._log is not None:
            self._log.log(step.number, values, numbers, norms)

    def _loss(self, step: Step) -> Reading:
        """The mean loss of the global batch, the greatest mean of one data-parallel rank's rows, and the norm."""
        shares = torch.zeros(2, self._env.degrees.dp, dtype=torch.float64, device=step.loss.device)
        shares[0, self._env.data_rank] = step.loss
        shares[1, self._env.data_rank] = step.own_share if self._env.counts_rows else 0.0
        self._env.sum_loss(shares)
        greatest = (shares[0] / shares[1].clamp(min=1e-300)).where(shares[1] > 0, -torch.inf).max()
        return Reading(
            ["loss", "loss_max", "grad_norm"], torch.stack([shares[0].sum(), greatest, step.grad_norm.double()])
        )

    def add(self, values: Mapping[str, float]) -> None:
        """Numbers to log with the step that ends, which is then logged whatever its number; the same on all ranks."""
        self._added |= values

    def attach(self, values: Mapping[str, float]) -> None:
        """Numbers that rank 0 logs with the next line there is."""
        self._attached |= values

    def end_save(self, blocking_seconds: float) -> None:
        """Adds to what the next logged step reports."""
        self._saving_seconds += blocking_seconds

    def _expert_loads(self, step: Step) -> dict[str, float]:
        """The greatest and the least load of an expert in any layer, relative to the mean; writes all of them down."""
        loads = self._env.gather_stages({name: load.tolist() for name, load in step.expert_loads.items()})
        if not loads:
            return {}
        if self._loads is not None:
            by_expert = {f"{name}.{i}": load for name, layer in loads.items() for i, load in enumerate(layer)}
            self._loads.log(step.number, by_expert)
        relative = [load * len(layer) / max(sum(layer), 1) for layer in loads.values() for load in layer]
        return {"expert_load_max": max(relative), "expert_load_min": min(relative)}

    def checkpoint_meta(self) -> dict[str, Any]:
        """The ids by which outside trackers know this run, all of whose lines up to here are written."""
        if self._log is not None:
            self._log.flush()
        return {"tracker_ids": dict(self._sinks.tracker_ids)} if self._sinks is not None else {}

    def close(self) -> None:
        """Writes what is left and closes the sinks."""
        if self._log is not None:
            self._log.flush()
        for sinks in (self._sinks, self._loads):
            if sinks is not None:
                sinks.close()


class LogSamples(Hook):
    """Writes the ids of the samples that one data-parallel rank reads, one JSON object a step."""

    def __init__(self, run_directory: Path, rank: int) -> None:
        folder = run_directory / "samples"
        folder.mkdir(exist_ok=True)
        self._file: IO[str] = (folder / f"rank-{rank}.jsonl").open("a")

    def end_step(self, step: Step) -> None:
        """Writes one line, at once."""
        line: Mapping[str, object] = {"step": step.number, "sample_ids": step.sample_ids.tolist()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def build_log(
    config: TrainConfig,
    env: Environment,
    checkpoint: Checkpoint | None,
    step: int,
    rewrites: Rewrites,
    record: Recorder,
) -> LogMetrics:
    """The log of a run, which goes on after `step`, from `checkpoint` or what another replica group knew."""
    directory = own_folder(config)
    sinks = env.main_only(
        lambda: build_sinks(
            config.metrics,
            directory,
            config.training.steps,
            resume_step=step or (0 if checkpoint else None),
            tracker_ids=cast(dict[str, str], checkpoint.meta["tracker_ids"]) if checkpoint else None,
            run_config=dataclasses.asdict(config),
        )
    )
    has_experts = config.model.moe is not None
    loads = env.main_only(lambda: _open_expert_loads(directory, step)) if has_experts else None
    given = config.metrics.peak_tflops
    meter = Meter(  # last: its first window opens here
        flops_per_token=training_flops_per_token(config.model, config.training.seq_len),
        peak_flops=given * 1e12 if given else _peak_flops(config, env.device_name(), rewrites),
        devices=env.degrees.world_size * config.replica.groups,
    )
    return LogMetrics(config, env, meter, sinks, loads, record)


def _peak_flops(config: TrainConfig, device: str, rewrites: Rewrites) -> float | None:
    """Of one device, for what the run computes in each precision; None where one of the peaks is not known."""
    compute_dtype = config.precision.param_dtype or config.precision.master_dtype
    shares = rewrites.flops_by_precision(config)
    return mixed_peak(device, {compute_dtype if kind == "high" else kind: share for kind, share in shares.items()})


def _open_expert_loads(directory: Path, step: int) -> Sinks:
    """A record of its own, since thousands of experts would drown the other metrics."""
    path = directory / "expert_loads.jsonl"
    resume_jsonl(path, step)
    return Sinks({"expert loads": JsonlSink(path)})
