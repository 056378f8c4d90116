"""Arithmetic of the parallel degrees: which layouts exist for a number of ranks. Imports no torch.

The world is a grid of pp x dp_replicate x dp_shard x cp x tp ranks, outermost first; ep shares the ranks of
dp_shard x cp x tp.
"""

import math
from dataclasses import dataclass

from titan_core.config import ParallelConfig

_GRID = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


class LayoutError(ValueError):
    """The degrees do not fit the number of ranks; the message names each offending degree and a remedy."""


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Resolved degrees, all at least 1; their grid fills the world exactly."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    ep: int

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(getattr(self, name) for name in _GRID)

    @property
    def dp(self) -> int:
        """Ranks that read different rows of a batch."""
        return self.dp_replicate * self.dp_shard


def degree_problems(config: ParallelConfig, world_size: int) -> list[str]:
    """Why `config` cannot be laid out on `world_size` ranks: one sentence each, with a remedy; empty if it can."""
    problems = []
    for name in (*_GRID, "ep"):
        degree = getattr(config, name)
        if name == "dp_shard" and degree == -1:
            continue
        if degree < 1:
            lowest = "-1 (what is left) or at least 1" if name == "dp_shard" else "at least 1"
            problems.append(f"parallel.{name} is {degree}; it must be {lowest}.")
        elif world_size % degree:
            problems.append(
                f"parallel.{name} {degree} does not divide the {world_size} ranks; use one of {divisors(world_size)}."
            )
    return problems or _product_problems(config, world_size) or _expert_problems(config, world_size)


def _product_problems(config: ParallelConfig, world_size: int) -> list[str]:
    given = {name: getattr(config, name) for name in _GRID if getattr(config, name) not in (1, -1)}
    product = math.prod(given.values())
    spelt = " x ".join(f"{name} {degree}" for name, degree in given.items()) or "all degrees 1"
    if config.dp_shard == -1:
        if world_size % product:
            return [
                f"parallel: {spelt} = {product} does not divide the {world_size} ranks, so nothing whole is left for "
                "dp_shard; lower a degree or start another number of ranks."
            ]
    elif product != world_size:
        whole = world_size % (product // config.dp_shard) == 0
        instead = "set parallel.dp_shard to -1, which takes what is left" if whole else "lower a degree"
        return [
            f"parallel: {spelt} is a layout for {_ranks(product)}, not for {_ranks(world_size)}; {instead}, or use "
            f"{_ranks(product)} (torchrun --nproc-per-node {product})."
        ]
    return []


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _expert_problems(config: ParallelConfig, world_size: int) -> list[str]:
    inner = world_size // (config.pp * config.dp_replicate)
    if inner % config.ep:
        return [
            f"parallel.ep {config.ep} does not divide the {inner} ranks of dp_shard x cp x tp, from which experts take "
            f"theirs; use one of {divisors(inner)}."
        ]
    return []


def resolve_degrees(config: ParallelConfig, world_size: int) -> Degrees:
    """Fills in `dp_shard = -1` and checks that the degrees fill the world.

    Raises:
        LayoutError: naming every degree that does not fit.
    """
    if problems := degree_problems(config, world_size):
        raise LayoutError(" ".join(problems))
    others = config.pp * config.dp_replicate * config.cp * config.tp
    dp_shard = world_size // others if config.dp_shard == -1 else config.dp_shard
    return Degrees(
        pp=config.pp,
        dp_replicate=config.dp_replicate,
        dp_shard=dp_shard,
        cp=config.cp,
        tp=config.tp,
        ep=config.ep,
    )


def divisors(n: int) -> list[int]:
    """The divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]
