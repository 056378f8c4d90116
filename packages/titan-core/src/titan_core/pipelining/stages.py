"""Pipeline stages: how layers are cut into them, which rank runs which, and what each schedule asks for.

Imports no torch: a login node can check a pipeline.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from titan_core.config import ParallelConfig
from titan_core.pipelining.schedule_file import read_schedule


class PipelineError(ValueError):
    """The model cannot be cut as asked; the message says where, and what would work."""


@dataclass(frozen=True, kw_only=True)
class ScheduleFacts:
    """What a schedule needs, and what it cannot be combined with."""

    stages_per_rank: int
    """Stages on each rank unless told otherwise."""
    fixed: bool
    """Whether it works with that number only."""
    shape: Literal["loop", "v"] = "loop"
    """`loop`: stage i runs on rank i modulo pp; `v`: there and back again, so that rank 0 has the first and the
    last."""
    splits_backward: bool = False
    """Whether gradients of weights are computed apart from those of activations."""


SCHEDULES = {
    "GPipe": ScheduleFacts(stages_per_rank=1, fixed=True),
    "1F1B": ScheduleFacts(stages_per_rank=1, fixed=True),
    "Interleaved1F1B": ScheduleFacts(stages_per_rank=2, fixed=False),
    "LoopedBFS": ScheduleFacts(stages_per_rank=2, fixed=False),
    "InterleavedZeroBubble": ScheduleFacts(stages_per_rank=2, fixed=False, splits_backward=True),
    "ZBVZeroBubble": ScheduleFacts(stages_per_rank=2, fixed=True, shape="v", splits_backward=True),
    "DualPipeV": ScheduleFacts(stages_per_rank=2, fixed=True, shape="v", splits_backward=True),
}


def stage_count(config: ParallelConfig) -> int:
    """Number of pipeline stages over all ranks; for a schedule from a file `pp_stages_per_rank`, or one a rank."""
    default = 1 if config.pp_schedule_csv else SCHEDULES[config.pp_schedule].stages_per_rank
    return config.pp * (config.pp_stages_per_rank or default)


def pipeline_problems(config: ParallelConfig, *, layers: int, micro_batches: int) -> list[str]:
    """Why `layers` blocks and `micro_batches` a step cannot run in the pipeline of `config`; empty if they can."""
    if config.pp == 1:
        return _without_effect(config)
    problems = []
    stages, facts, name = stage_count(config), SCHEDULES[config.pp_schedule], config.pp_schedule
    per_rank = config.pp_stages_per_rank
    if per_rank is not None and per_rank < 1:
        return [f"parallel.pp_stages_per_rank is {per_rank}; it must be at least 1."]
    if not config.pp_schedule_csv and facts.fixed and per_rank not in (None, facts.stages_per_rank):
        problems.append(
            f"parallel.pp_stages_per_rank is {per_rank}, but {name} works with {facts.stages_per_rank} only; leave "
            f"it out."
        )
    if stages > layers:
        problems.append(
            f"The pipeline has {stages} stages, but the model only {layers} layers{_remedy(config, stages, layers)}."
        )
    if config.pp_split and len(config.pp_split) != stages - 1:
        problems.append(
            f"parallel.pp_split names {len(config.pp_split)} blocks, but {stages} stages begin at {stages - 1} of them "
            "(the first begins with the model); name one block for each further stage."
        )
    if config.pp_schedule_csv:
        return problems
    if name in ("1F1B", "DualPipeV") and micro_batches < stages:
        problems.append(
            f"{name} with {stages} stages needs at least {stages} micro-batches a step, but there are {micro_batches}; "
            "lower training.micro_batch_size, raise training.global_batch_size, or use GPipe."
        )
    rounds = max(1, micro_batches // config.pp)
    if name in ("Interleaved1F1B", "InterleavedZeroBubble") and micro_batches % rounds:
        problems.append(
            f"{name} on {config.pp} ranks cannot run {micro_batches} micro-batches a step in equal rounds; use a "
            f"multiple of {config.pp}: change training.micro_batch_size or training.global_batch_size."
        )
    return problems


def _remedy(config: ParallelConfig, stages: int, layers: int) -> str:
    """What makes stages fewer, where the schedule lets anything."""
    if stages == config.pp:
        return "; lower parallel.pp"
    if config.pp_schedule_csv or not SCHEDULES[config.pp_schedule].fixed:
        return "; lower parallel.pp_stages_per_rank or parallel.pp"
    single = ", or use a schedule with one stage a rank, such as 1F1B" if config.pp <= layers else ""
    return f", and {config.pp_schedule} needs {stages // config.pp} a rank; lower parallel.pp{single}"


def _without_effect(config: ParallelConfig) -> list[str]:
    default = ParallelConfig()
    return [
        f"parallel.{name} is set, but there is no pipeline; set parallel.pp to 2 or more, or leave it out."
        for name in ("pp_schedule", "pp_schedule_csv", "pp_stages_per_rank", "pp_split")
        if getattr(config, name) != getattr(default, name)
    ]


def rank_of_stage(stage: int, pp: int, shape: Literal["loop", "v"]) -> int:
    """The pipeline rank that runs `stage`."""
    turn, place = divmod(stage, pp)
    return pp - 1 - place if shape == "v" and turn % 2 else place


def balanced_stages(costs: Sequence[float], stages: int) -> list[int]:
    """Cuts a row of blocks into `stages` runs whose greatest cost is least; the index with which each begins.

    Among those with the least greatest cost, the one with the least sum of squares; every run has a block.
    """
    return list(_balanced(tuple(costs), stages))


@functools.cache
def _balanced(costs: tuple[float, ...], stages: int) -> tuple[int, ...]:
    blocks = len(costs)
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[i]: (greatest cost, sum of squares, starts) of the first i blocks in as many runs as the loop has reached.
    best: list[tuple[float, float, tuple[int, ...]] | None] = [(0.0, 0.0, ()), *[None] * blocks]
    for run in range(1, stages + 1):
        reached: list[tuple[float, float, tuple[int, ...]] | None] = [None] * (blocks + 1)
        for end in range(run, blocks - (stages - run) + 1):
            found = []
            for start in range(run - 1, end):
                before = best[start]
                if before is not None:
                    cost = total[end] - total[start]
                    found.append((max(before[0], cost), before[1] + cost * cost, (*before[2], start)))
            reached[end] = min(found, default=None)
        best = reached
    result = best[blocks]
    if result is None:
        raise ValueError(f"{blocks} blocks cannot be cut into {stages} stages.")
    return result[2]


def stage_ranks(config: ParallelConfig) -> list[int]:
    """The pipeline rank of each stage."""
    count = stage_count(config)
    if config.pp_schedule_csv:
        ranks = read_schedule(config.pp_schedule_csv).ranks()
        return [ranks[stage] for stage in range(count)]
    shape = SCHEDULES[config.pp_schedule].shape
    return [rank_of_stage(stage, config.pp, shape) for stage in range(count)]


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
