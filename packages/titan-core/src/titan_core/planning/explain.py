"""What a layout makes of a model, as plain data: meshes, roles, parameters, pipeline stages and traffic.

Everything is read from what `titan_core.parallelize` really built, on real ranks or on fake ones
(`titan_core.planning.fake_world`). `titan_core.planning.explain_text` turns it into text.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from titan_core.config import CompileConfig, ParallelConfig, RematConfig
from titan_core.degrees import Degrees
from titan_core.mesh import Meshes
from titan_core.pipelining.stages import stage_names, stage_ranks
from titan_core.planning.timeline import Timeline
from titan_core.planning.traffic import Flow
from titan_core.roles import ROLES, role_of_parameter
from titan_core.shards import is_dtensor, local


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of a mesh, seen from one rank."""

    name: str
    """As in the mesh."""
    ranks: tuple[int, ...]
    """The ranks along it that differ from this one in nothing else, and this one."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One of the three meshes."""

    name: str
    """`data`, `dense` or `experts`."""
    axes: tuple[Axis, ...]
    """Outermost first."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters with one name, but for the numbers of their layers, that are laid out alike."""

    pattern: str
    """Their FQN, with `*` for numbers."""
    role: str
    """That of the module they belong to."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    local_shape: tuple[int, ...]
    """Of the part on the rank that was looked at."""
    dtype: str
    """Such as `float32`: what the optimizer works on."""
    placements: tuple[tuple[str, str], ...]
    """Axis -> `R` (a copy on each rank) or `S(i)` (dimension i is cut); empty for a plain tensor."""
    count: int
    """How many there are."""


@dataclass(frozen=True, kw_only=True)
class RoleTreatment:
    """What the layout does with all modules of one role."""

    role: str
    """A key of `titan_core.roles.ROLES`."""
    modules: int
    """How many modules of the model have it."""
    techniques: tuple[str, ...]
    """One sentence for each technique that touches them."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the pipeline."""

    number: int
    """In the order of the model."""
    rank: int
    """Of the pipeline, which runs it."""
    modules: tuple[str, ...]
    """Its outermost modules, in the model's order."""
    cost_share: float
    """Its share of the costs by which stages are balanced, 0 to 1."""
    parameters: int
    """Parameters in it, whole."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A layout, explained."""

    world_size: int
    """Number of ranks."""
    rank: int
    """The rank whose meshes and traffic are shown."""
    views: tuple[View, ...]
    """The meshes; empty for one rank."""
    roles: tuple[RoleTreatment, ...]
    """In the order of the table of roles."""
    parameters: tuple[Parameters, ...]
    """In the model's order; local shapes are those of the first rank of each pipeline stage."""
    stages: tuple[Stage, ...] = ()
    """Without a pipeline, none."""
    timeline: Timeline | None = None
    """A step of the pipeline."""
    traffic: tuple[Flow, ...] = ()
    """What the rank sends and receives in a step."""


def describe_meshes(meshes: Meshes) -> tuple[View, ...]:
    """The meshes, seen from this rank."""
    named = {"data": meshes.data, "dense": meshes.dense, "experts": meshes.experts}
    return tuple(View(name=name, axes=_axes(mesh)) for name, mesh in named.items() if mesh is not None)


def _axes(mesh: DeviceMesh) -> tuple[Axis, ...]:
    return tuple(
        Axis(name=name, ranks=tuple(dist.get_process_group_ranks(mesh.get_group(name))))
        for name in mesh.mesh_dim_names or ()
    )


def describe_parameters(model: nn.Module, roles: Mapping[str, str]) -> tuple[Parameters, ...]:
    """The parameters of `model`, which may be a pipeline's part, as they lie on this rank."""
    return merge_parameters(_describe(fqn, p, role_of_parameter(fqn, roles)) for fqn, p in model.named_parameters())


def merge_parameters(parameters: Iterable[Parameters]) -> tuple[Parameters, ...]:
    """Adds up those that differ in their count only, in the order in which they come."""
    counts: Counter[Parameters] = Counter()
    for line in parameters:
        counts[replace(line, count=0)] += line.count
    return tuple(replace(line, count=count) for line, count in counts.items())


def _describe(fqn: str, parameter: nn.Parameter, role: str) -> Parameters:
    placements: tuple[tuple[str, str], ...] = ()
    if is_dtensor(parameter):
        names = parameter.device_mesh.mesh_dim_names or ()
        # What FSDP cuts after another axis has cut the same dimension denies to be a Shard, but has a dimension.
        marks = ["R" if p.is_replicate() else f"S({getattr(p, 'dim', '?')})" for p in parameter.placements]
        placements = tuple(zip(names, marks, strict=True))
    return Parameters(
        pattern=re.sub(r"(?<![^.])\d+(?![^.])", "*", fqn),
        role=role,
        shape=tuple(parameter.shape),
        local_shape=tuple(local(parameter).shape),
        dtype=str(parameter.dtype).removeprefix("torch."),
        placements=placements,
        count=1,
    )


def describe_stages(
    model: nn.Module, roles: Mapping[str, str], config: ParallelConfig, costs: Mapping[str, float]
) -> tuple[Stage, ...]:
    """The stages into which `model`, which is whole and may be on the meta device, is cut; none without a pipeline.

    `costs` as for `titan_core.parallelize.parallelize`.
    """
    if config.pp == 1:
        return ()
    total = sum(costs.values()) or 1.0
    return tuple(
        Stage(
            number=number,
            rank=rank,
            modules=tuple(names),
            cost_share=sum(cost for fqn, cost in costs.items() if _within(fqn, names)) / total,
            parameters=sum(p.numel() for name in names for p in model.get_submodule(name).parameters()),
        )
        for number, (names, rank) in enumerate(zip(stage_names(roles, config, costs), stage_ranks(config), strict=True))
    )


def _within(fqn: str, modules: Iterable[str]) -> bool:
    return any(fqn == module or fqn.startswith(f"{module}.") for module in modules)


def describe_roles(
    roles: Mapping[str, str],
    degrees: Degrees,
    config: ParallelConfig,
    *,
    remat: RematConfig = RematConfig(),
    compiling: CompileConfig = CompileConfig(),
) -> tuple[RoleTreatment, ...]:
    """What each technique does with each role of a model; `roles` as `resolve_roles` returns them."""
    counts = Counter(roles.values())
    return tuple(
        RoleTreatment(
            role=role,
            modules=counts[role],
            techniques=(
                *_sharding(role, degrees, config),
                *_tensor(role, degrees, config),
                *_tokens(role, degrees, config),
                *_experts(role, degrees),
                *(_blocks(remat, compiling) if role == "block" else ()),
            ),
        )
        for role in ROLES
        if counts[role]
    )


def _sharding(role: str, degrees: Degrees, config: ParallelConfig) -> Sequence[str]:
    shards = degrees.dp_shard * degrees.cp
    if not ROLES[role].unit or shards * degrees.dp_replicate == 1:
        return ()
    replicas = f" and all-reduced over {degrees.dp_replicate} replicas" if degrees.dp_replicate > 1 else ""
    if shards == 1:
        return (f"gradients all-reduced over {degrees.dp_replicate} replicas",)
    policy = config.reshard_after_forward
    frees = policy == "always" or (policy == "default" and config.pp == 1)
    after = "freed after forward and gathered again for backward" if frees else "kept until the step ends"
    if isinstance(policy, int):
        after = f"then kept by groups of {policy} ranks until backward"
    offload = "; rests in the host's memory" if config.cpu_offload else ""
    return (f"gathered over {shards} fsdp ranks, {after}; gradients reduce-scattered{replicas}{offload}",)


def _tensor(role: str, degrees: Degrees, config: ParallelConfig) -> Sequence[str]:
    style = ROLES[role].tensor
    if style is None or degrees.tp == 1:
        return ()
    cut = config.sequence_parallel
    return (
        {
            "vocabulary": "each tp rank looks up its rows of the vocabulary; results are "
            + ("summed, and cut along the sequence" if cut else "summed"),
            "region": "the sequence is gathered over tp on entry" if cut else "the input's gradient is summed over tp",
            "column": "each tp rank computes its columns",
            "row": "each tp rank computes its share of the sum, which is "
            + ("reduce-scattered along the sequence" if cut else "all-reduced"),
            "sequence": "each tp rank sees its tokens; the weight's gradient is summed over tp"
            if cut
            else "every tp rank does the same",
            "heads": "each tp rank sees its heads; the weight's gradient is summed over tp",
            "loss": "each tp rank computes its logits; of the loss only a few numbers a token are exchanged",
        }[style],
    )


def _tokens(role: str, degrees: Degrees, config: ParallelConfig) -> Sequence[str]:
    if not ROLES[role].context or degrees.cp == 1:
        return ()
    ways = {
        "ring": "keys and values go around a ring of",
        "allgather": "keys and values are gathered from",
        "ulysses": "heads are exchanged for tokens among",
    }
    return (f"{ways[config.cp_method]} {degrees.cp} cp ranks",)


def _experts(role: str, degrees: Degrees) -> Sequence[str]:
    if ROLES[role].expert and degrees.ep > 1:
        return (f"cut over {degrees.ep} ep ranks; tokens travel to their experts and back",)
    if ROLES[role].routes and degrees.world_size > 1:
        return ("its load is summed over all ranks at the end of a step",)
    return ()


def _blocks(remat: RematConfig, compiling: CompileConfig) -> Sequence[str]:
    found = []
    if remat.mode != "none":
        which = f", every {remat.every} blocks" if remat.every > 1 else ""
        found.append(f"activations recomputed in backward ({remat.mode}{which})")
    if compiling.enabled:
        found.append(f"compiled ({compiling.backend})")
    return found
