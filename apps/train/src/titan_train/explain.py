"""`titan-train --explain`: what a layout makes of a model, without a GPU and without other ranks."""

import torch

from titan_core.compiling import check_backend
from titan_core.degrees import resolve_degrees
from titan_core.pipelining.schedule_order import compute_order
from titan_core.planning.explain import (
    Explanation,
    Parameters,
    View,
    describe_meshes,
    describe_parameters,
    describe_roles,
    describe_stages,
    merge_parameters,
)
from titan_core.planning.explain_text import render
from titan_core.planning.timeline import play
from titan_core.roles import resolve_roles
from titan_core.text import terminal_width, wrap
from titan_models.facts import flops_per_token
from titan_train.build import full_share, lay_out
from titan_train.config import TrainConfig
from titan_train.forked import in_processes
from titan_train.rehearsal import fake_environment, rehearsable, rehearse_traffic


def explanation_text(config: TrainConfig, world_size: int) -> str:
    """What `titan-train --explain` prints for a validated configuration on `world_size` ranks."""
    width = terminal_width()
    notes = [wrap(f"note: {note}", width) for note in _assumptions(config)]
    return render(explain(config, world_size), width) + "\n\n" + "\n".join(notes)


def explain(config: TrainConfig, world_size: int) -> Explanation:
    """The layout of a validated configuration on `world_size` ranks.

    Meshes are seen from, and traffic is that of, the first rank of the pipeline rank whose stages cost most.
    """
    check_backend(config.compile)
    degrees = resolve_degrees(config.parallel, world_size)
    with torch.device("meta"):
        model = config.model.build()
    roles = resolve_roles(model, config.model.roles())
    stages = describe_stages(model, roles, config.parallel, flops_per_token(config.model, config.training.seq_len))
    cost = [sum(stage.cost_share for stage in stages if stage.rank == rank) for rank in range(degrees.pp)]
    firsts = [rank * (world_size // degrees.pp) for rank in range(degrees.pp)]
    rank = firsts[cost.index(max(cost))]
    looks = in_processes(_look, [(config, world_size, first) for first in firsts], "laying out the model")
    seen = dict(zip(firsts, looks, strict=True))
    timeline = None
    if degrees.pp > 1:
        micro_batches = full_share(config, degrees).micro_batches
        timeline = play(compute_order(config.parallel, micro_batches))
    return Explanation(
        world_size=world_size,
        rank=rank,
        views=seen[rank][0],
        roles=describe_roles(roles, degrees, config.parallel, remat=config.remat, compiling=config.compile),
        parameters=merge_parameters(line for _, lines in seen.values() for line in lines),
        stages=stages,
        timeline=timeline,
        traffic=rehearse_traffic(config, world_size, rank),
    )


def _look(config: TrainConfig, world_size: int, rank: int) -> tuple[tuple[View, ...], tuple[Parameters, ...]]:
    """The meshes and the parameters as `rank` has them."""
    with fake_environment(config, world_size, rank) as env:
        laid_out = lay_out(rehearsable(config), env)
        views = () if env.meshes is None else describe_meshes(env.meshes)
        return views, describe_parameters(laid_out.model, laid_out.roles)


def _assumptions(config: TrainConfig) -> list[str]:
    notes = [
        "a step's traffic leaves out what ranks agree on beside training: whether to stop, what is logged and saved"
    ]
    if config.model.moe is not None and config.parallel.ep > 1:
        notes.append("tokens are taken to be dealt evenly to experts; real routing moves more or fewer to some ranks")
    if config.compile.enabled:
        notes.append(
            "the compiler was not run; recomputation chosen by it, and what it fuses, may change a few numbers"
        )
    return notes
