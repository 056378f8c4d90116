"""Which layouts of so many ranks fit into a GPU's memory, in the order in which to try them. Imports no torch."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from titan_core.config import ParallelConfig, RematConfig
from titan_core.degrees import divisors
from titan_train.config import TrainConfig
from titan_train.plan import Plan, PlanError, check_modelled, plan
from titan_train.validate import problems

ORDER_RULE = (
    "least communication first: small tp, then small pp; of each the lightest recomputation that fits, none before "
    "selective before full. dp_shard takes the ranks that are left; all else is as configured"
)
_REMAT = (RematConfig(), RematConfig(mode="selective"), RematConfig(mode="full"))


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout that was tried."""

    config: TrainConfig
    """The configuration, so laid out."""
    plan: Plan
    """What it takes."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What was found for a memory of so many bytes."""

    memory_bytes: int
    """Of one GPU."""
    fitting: tuple[Candidate, ...]
    """In the order of `ORDER_RULE`."""
    tried: int
    """Layouts that are valid."""
    smallest: Candidate
    """The one that takes least, whether it fits or not."""


def fit(config: TrainConfig, world_size: int, memory_bytes: int) -> Fit:
    """Tries each tp and pp that this number of ranks allows.

    Raises:
        PlanError: for what is not modelled, or if no layout is valid.
    """
    check_modelled(dataclasses.replace(config, remat=RematConfig()))
    tried: list[Candidate] = []
    fitting: list[Candidate] = []
    refused = ""
    for parallel in _layouts(config, world_size):
        here: list[Candidate] = []
        for remat in _REMAT:
            candidate = dataclasses.replace(config, parallel=parallel, remat=remat)
            if wrong := problems(candidate, world_size):
                refused = wrong[0]
            else:
                here.append(Candidate(config=candidate, plan=plan(candidate, world_size)))
        tried += here
        fitting += [candidate for candidate in here if candidate.plan.total <= memory_bytes][:1]
    if not tried:
        ranks = f"{world_size} ranks" if world_size > 1 else "1 rank"
        raise PlanError(
            f"No layout of this configuration is valid on {ranks}, whatever tp, pp and recomputation. Of "
            f"the last one: {refused}"
        )
    smallest = min(tried, key=lambda candidate: candidate.plan.total)
    return Fit(memory_bytes=memory_bytes, fitting=tuple(fitting), tried=len(tried), smallest=smallest)


def _layouts(config: TrainConfig, world_size: int) -> Iterator[ParallelConfig]:
    """In the order of `ORDER_RULE`; what is only for a pipeline or for tp is left out where there is none."""
    model, given, default = config.model, config.parallel, ParallelConfig()
    for tp in divisors(world_size):
        if model.kv_heads % tp or model.heads % tp:
            continue
        for pp in divisors(world_size // tp):
            if pp > model.layers:
                break
            parallel = dataclasses.replace(given, tp=tp, pp=pp, dp_shard=-1)
            if pp == 1:
                single = ("pp_schedule", "pp_schedule_csv", "pp_stages_per_rank", "pp_split")
                parallel = dataclasses.replace(parallel, **{name: getattr(default, name) for name in single})
            if tp == 1:
                parallel = dataclasses.replace(parallel, sequence_parallel=True, async_tp=False)
            yield parallel
