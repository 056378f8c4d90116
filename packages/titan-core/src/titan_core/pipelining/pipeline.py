"""Pipeline parallelism: each rank of the pp axis holds some stages of the model and passes hidden states on.

A stage is the model itself with parts missing, so names do not change and checkpoints do not know about stages. The
schedules are those of torch.distributed.pipelining. Gradients are reduced over data-parallel ranks once, after the last
micro-batch.
"""

import contextlib
import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from titan_core.compat import pipeline_schedule_from_actions
from titan_core.config import ParallelConfig
from titan_core.fsdp import whole_gradient_bytes
from titan_core.layout import Batch, OnAction
from titan_core.micro_batches import evaluating, split_rows
from titan_core.pipelining.forward import forward
from titan_core.pipelining.schedule_file import read_schedule
from titan_core.pipelining.stages import PipelineError, stage_count, stage_names, stage_ranks
from titan_core.routers import Routers


@dataclass(frozen=True)
class Stages:
    """This rank's stages of a model: `parts` by their number, and all of them together as one module, `model`.

    They share their modules with each other and with the model that was cut.
    """

    model: nn.Module
    parts: Mapping[int, nn.Module]
    count: int


def cut_into_stages(
    model: nn.Module, roles: Mapping[str, str], config: ParallelConfig, rank: int, costs: Mapping[str, float]
) -> Stages:
    """The stages that pipeline rank `rank` runs.

    `costs`: FQN of a module -> its cost, in any unit, by which the blocks are shared out; modules not named cost
    nothing.

    Raises:
        PipelineError: if `pp_split` names no blocks of the model in their order, or parameters are shared by stages.
    """
    names, ranks = stage_names(roles, config, costs), stage_ranks(config)
    _refuse_sharing(model, names)
    own = [stage for stage, holder in enumerate(ranks) if holder == rank]
    parts = {stage: part_of(model, names[stage]) for stage in own}
    return Stages(part_of(model, [fqn for stage in own for fqn in names[stage]]), parts, len(names))


def _refuse_sharing(model: nn.Module, names: Sequence[Sequence[str]]) -> None:
    stage_of: dict[nn.Parameter, int] = {}
    for stage, fqns in enumerate(names):
        for fqn in fqns:
            for parameter in model.get_submodule(fqn).parameters():
                if stage_of.setdefault(parameter, stage) != stage:
                    raise PipelineError(
                        f"{fqn!r} on the pipeline's stage {stage} shares a parameter with stage "
                        f"{stage_of[parameter]}; a model with tied embeddings cannot be pipelined. Set "
                        "model.tie_embeddings to false, or parallel.pp to 1."
                    )


def part_of(model: nn.Module, keep: Iterable[str], prefix: str = "") -> nn.Module:
    """`model` with only the submodules that `keep` names, and shares; others are None, or left out of a list."""
    part = copy.copy(model)
    for name, value in vars(model).items():
        if isinstance(value, dict):  # hooks and the like belong to one part
            vars(part)[name] = copy.copy(value)
    part._modules = {}
    keep = list(keep)
    for name, child in model._modules.items():
        fqn = prefix + name
        if fqn in keep:
            part._modules[name] = child
        elif child is not None and any(kept.startswith(f"{fqn}.") for kept in keep):
            part._modules[name] = part_of(child, keep, f"{fqn}.")
        elif not isinstance(model, (nn.ModuleDict, nn.ModuleList)):
            part._modules[name] = None
    return part


class _Stage(PipelineStage):
    """Tells of each of its actions when it began and ended."""

    on_action: OnAction | None = None

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self._told("F", fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> Any:
        with self._told("B" if full_backward else "I", bwd_chunk_id):
            return super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> Any:
        with self._told("W", bwd_chunk_id):
            return super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    @contextlib.contextmanager
    def _told(self, name: str, micro_batch: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.on_action is not None:
            self.on_action(name, self.stage_index, micro_batch, start, time.perf_counter())


class Pipeline:
    """Runs this rank's stages over the micro-batches of a step."""

    def __init__(
        self,
        stages: Stages,
        routers: Routers,
        config: ParallelConfig,
        group: ProcessGroup,
        *,
        size: int,
        width: int,
        sequence_cut: int,
        dtype: torch.dtype,
        itemsize: int,
    ) -> None:
        """`size`: rows of a micro-batch. `width`: D of the hidden states, which have `dtype`. `sequence_cut`: into how
        many parts tp cuts a sequence between blocks. `itemsize`: bytes of an element of a gradient.
        """
        self.model = stages.model
        self.routers = routers
        self._stages, self._config, self._group, self._size = stages, config, group, size
        self._width, self._sequence_cut, self._dtype, self._itemsize = width, sequence_cut, dtype, itemsize
        self._schedule: Any = None
        self._on_action: OnAction | None = None
        self._divisor = 1.0

    def accumulate(self, batch: Batch, *, divisor: float) -> Tensor:
        """Adds up gradients of the model's summed loss over `batch`, divided by `divisor`; rows fill whole
        micro-batches.

        Returns that loss, a float64 scalar, on the ranks with the last stage, and zero on the others.
        """
        tokens, labels = batch["tokens"], batch["labels"]
        if self._schedule is None:
            self._schedule = self._build(tokens)
        self._divisor = divisor
        losses: list[Tensor] = []
        others = {name: tensor for name, tensor in batch.items() if name != "tokens"}
        self._schedule.step(tokens, target=labels, losses=losses, return_outputs=False, **others)
        return _sum(losses, tokens.device)

    def evaluate(self, batch: Batch) -> Tensor:
        """The model's summed loss over `batch`: a float64 scalar, zero but on the ranks with the last stage."""
        tokens = batch["tokens"]
        hidden = self._hidden(tokens.shape[1], tokens.device)
        micro_batches = list(split_rows(batch, self._size))
        with evaluating(self.model):
            losses = forward(self._stages.parts, stage_ranks(self._config), micro_batches, hidden, self._group)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what no backward will drop
        return _sum(losses, tokens.device)

    def gradient_bytes(self) -> int:
        """Bytes that gradients take on this rank while micro-batches accumulate, beyond the sharded ones."""
        return whole_gradient_bytes(self.model, self._itemsize)

    def watch(self, on_action: OnAction) -> None:
        """See `Layout.watch`; to be called before the first step."""
        self._on_action = on_action

    def _hidden(self, length: int, device: torch.device) -> Tensor:
        """As large as what a stage hands on for a micro-batch of rows of `length` tokens."""
        return torch.empty(self._size, length // self._sequence_cut, self._width, dtype=self._dtype, device=device)

    def _build(self, tokens: Tensor) -> Any:
        rows, length = tokens.shape
        if rows % self._size:
            raise PipelineError(
                f"A pipeline got {rows} rows, which do not fill micro-batches of {self._size}; pad them with rows "
                "without labels."
            )
        # Given ahead, so that the first step does not run the model once more to see shapes.
        hidden = self._hidden(length, torch.device("meta")).requires_grad_()
        loss = torch.empty((), dtype=torch.promote_types(self._dtype, torch.float32), device="meta", requires_grad=True)
        count = self._stages.count
        stages = [
            _Stage(
                part,
                index,
                count,
                tokens.device,
                input_args=tokens[: self._size].to("meta") if index == 0 else hidden,
                output_args=loss if index == count - 1 else hidden,
                group=self._group,
            )
            for index, part in self._stages.parts.items()
        ]
        for stage in stages:
            stage.on_action = self._on_action
        return build_schedule(
            self._config,
            stages,
            n_microbatches=rows // self._size,
            loss_fn=lambda loss, _: loss / self._divisor,
            scale_grads=False,
        )


def _sum(losses: Sequence[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), device=device, dtype=torch.float64)
    for loss in losses:
        total += loss.detach()
    return total


def build_schedule(config: ParallelConfig, stages: Sequence[PipelineStage], **options: Any) -> Any:
    """The schedule that `config` names or that stands in its file, for this rank's `stages`.

    `options` are those of the schedules of torch.distributed.pipelining, `n_microbatches` among them.

    Raises:
        PipelineError: if the schedule in the file cannot run.
    """
    if config.pp_schedule_csv:
        file = read_schedule(config.pp_schedule_csv)
        count, micro_batches = stage_count(config), options["n_microbatches"]
        if problems := file.problems(pp=config.pp, stages=count, micro_batches=micro_batches):
            raise PipelineError(" ".join(problems))
        return pipeline_schedule_from_actions(file.rows, list(stages), **options)
    single = config.pp_schedule in ("GPipe", "1F1B")
    return get_schedule_class(config.pp_schedule)(stages[0] if single else list(stages), **options)
