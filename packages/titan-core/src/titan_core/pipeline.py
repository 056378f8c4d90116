"""Pipeline parallelism: each rank of the pp axis holds some stages of the model and passes hidden states on.

A stage is the model itself with parts missing, so names do not change and checkpoints do not know about stages. The
schedules are those of torch.distributed.pipelining. Gradients are reduced over data-parallel ranks once, after the last
micro-batch.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
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
from titan_core.layout import Batch
from titan_core.micro_batches import evaluating, split_rows
from titan_core.pipeline_forward import forward
from titan_core.routers import Routers
from titan_core.schedule_file import read_schedule
from titan_core.stages import SCHEDULES, balanced_stages, rank_of_stage, stage_count


class PipelineError(ValueError):
    """The model cannot be cut as asked; the message says where, and what would work."""


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


def stage_names(roles: Mapping[str, str], config: ParallelConfig, costs: Mapping[str, float]) -> list[list[str]]:
    """The outermost modules of each stage, in the model's order; `costs` as for `cut_into_stages`.

    Raises:
        PipelineError: if `pp_split` names no blocks of the model in their order.
    """
    pieces = _pieces(roles)
    blocks = [fqn for fqn in pieces if roles[fqn] == "block"]
    starts = _given_starts(blocks, config.pp_split)
    starts = starts or balanced_stages(_block_costs(pieces, blocks, costs), stage_count(config))
    ends = [*starts[1:], len(blocks)]
    first, last = pieces.index(blocks[0]), pieces.index(blocks[-1])
    names: list[list[str]] = [blocks[start:end] for start, end in zip(starts, ends, strict=True)]
    names[0], names[-1] = pieces[:first] + names[0], names[-1] + pieces[last + 1 :]
    return names


def _pieces(roles: Mapping[str, str]) -> list[str]:
    """The outermost modules that have a role, in the model's order."""
    pieces: list[str] = []
    for fqn in roles:
        if not pieces or not fqn.startswith(f"{pieces[-1]}."):
            pieces.append(fqn)
    return pieces


def _block_costs(pieces: Sequence[str], blocks: Sequence[str], costs: Mapping[str, float]) -> list[float]:
    """The cost of each block; what comes before the first and after the last counts with these."""

    def cost(piece: str) -> float:
        return sum(value for fqn, value in costs.items() if fqn == piece or fqn.startswith(f"{piece}."))

    found = [cost(block) for block in blocks]
    found[0] += sum(cost(piece) for piece in pieces[: pieces.index(blocks[0])])
    found[-1] += sum(cost(piece) for piece in pieces[pieces.index(blocks[-1]) + 1 :])
    return found


def _given_starts(blocks: Sequence[str], split: Sequence[str]) -> list[int]:
    for name in split:
        if name not in blocks:
            raise PipelineError(
                f"parallel.pp_split names {name!r}, which is no block of this model; its blocks are {blocks[0]} to "
                f"{blocks[-1]}."
            )
    starts = [0, *(blocks.index(name) for name in split)]
    if starts != sorted(set(starts)):
        raise PipelineError(
            f"parallel.pp_split {list(split)} must name different blocks in the order of the model, and not the first."
        )
    return starts if split else []


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


def stage_ranks(config: ParallelConfig) -> list[int]:
    """The pipeline rank of each stage."""
    count = stage_count(config)
    if config.pp_schedule_csv:
        ranks = read_schedule(config.pp_schedule_csv).ranks()
        return [ranks[stage] for stage in range(count)]
    shape = SCHEDULES[config.pp_schedule].shape
    return [rank_of_stage(stage, config.pp, shape) for stage in range(count)]


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
            PipelineStage(
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


def build_schedule(config: ParallelConfig, stages: list[PipelineStage], **options: Any) -> Any:
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
        return pipeline_schedule_from_actions(file.rows, stages, **options)
    single = config.pp_schedule in ("GPipe", "1F1B")
    return get_schedule_class(config.pp_schedule)(stages[0] if single else stages, **options)
