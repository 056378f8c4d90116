"""What each rank of a pipeline computes, and in which order, by arithmetic: torch's schedules without asking torch.

GPipe: arXiv 1811.06965. 1F1B: arXiv 1806.03377. Interleaved: arXiv 2104.04473, section 2.2. Breadth-first: arXiv
2211.05953. Schedules that compute gradients of weights apart are not known here; `schedule_order` beside it asks torch
about any.
"""

from titan_core.config import ParallelConfig
from titan_core.pipelining.schedule_file import read_schedule
from titan_core.pipelining.stages import SCHEDULES, stage_count
from titan_core.planning.timeline import Computation


class UnknownOrderError(ValueError):
    """The schedule's order is not known here."""


def rank_order(config: ParallelConfig, rank: int, micro_batches: int) -> list[Computation]:
    """What pipeline rank `rank` computes in a step, in order.

    Raises:
        UnknownOrderError: for schedules that compute gradients of weights apart.
    """
    if config.pp_schedule_csv:
        file = read_schedule(config.pp_schedule_csv)
        if file.splits_backward:
            raise UnknownOrderError(_unknown(config.pp_schedule_csv))
        return list(file.rows[rank])
    if SCHEDULES[config.pp_schedule].splits_backward:
        raise UnknownOrderError(_unknown(config.pp_schedule))
    pp, local = config.pp, stage_count(config) // config.pp
    own = [turn * pp + rank for turn in range(local)]
    if config.pp_schedule in ("GPipe", "LoopedBFS"):
        forwards = [(stage, "F", i) for stage in own for i in range(micro_batches)]
        downwards = config.pp_schedule == "LoopedBFS"
        turns = list(reversed(range(micro_batches))) if downwards else range(micro_batches)
        return forwards + [(stage, "B", i) for stage in reversed(own) for i in turns]
    if config.pp_schedule == "1F1B":
        return _alternating(own, micro_batches, 1, warm_up=pp - rank - 1)
    together = micro_batches // max(1, micro_batches // pp)
    return _alternating(own, micro_batches, together, warm_up=(local - 1) * together + 2 * (pp - 1 - rank))


def _alternating(own: list[int], micro_batches: int, together: int, *, warm_up: int) -> list[Computation]:
    """Forwards, then a forward and a backward in turn, then backwards; after `together` micro-batches another stage."""
    count, local = micro_batches * len(own), len(own)

    def action(step: int, kind: str) -> Computation:
        turn, place = divmod(step, together)
        stage = turn % local
        return own[stage if kind == "F" else local - 1 - stage], kind, turn // local * together + place

    warm_up = min(warm_up, count)
    actions = [action(step, "F") for step in range(warm_up)]
    for step in range(count - warm_up):
        actions += [action(warm_up + step, "F"), action(step, "B")]
    return actions + [action(step, "B") for step in range(count - warm_up, count)]


def _unknown(schedule: str) -> str:
    known = ", ".join(name for name, facts in SCHEDULES.items() if not facts.splits_backward)
    return (
        f"{schedule} computes gradients of weights apart from the others, which only a rehearsal can follow; use "
        f"titan-train --dry-run, or plan for one of {known}."
    )
