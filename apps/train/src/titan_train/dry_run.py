"""`titan-train --dry-run`: the memory of the heaviest rank, before a cluster is paid for."""

import dataclasses
import time
from dataclasses import dataclass

import torch

from titan_core.compiling import check_backend
from titan_core.degrees import resolve_degrees
from titan_core.pipelining.schedule_order import compute_order
from titan_core.planning.explain import Stage, describe_stages
from titan_core.planning.memory_use import MemoryUse
from titan_core.planning.timeline import most_in_flight
from titan_core.planning.traffic import Flow
from titan_core.roles import resolve_roles
from titan_core.text import human, terminal_width, wrap
from titan_models.facts import flops_per_token
from titan_train.build import full_share
from titan_train.config import TrainConfig
from titan_train.rehearsal import rehearse_all


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a training step takes of the ranks that were tried."""

    world_size: int
    """Number of ranks."""
    memory: dict[int, MemoryUse]
    """Rank -> bytes alive on its device when most are."""
    host_memory: dict[int, MemoryUse]
    """Rank -> bytes alive in the host's memory when most are there, if anything is offloaded."""
    traffic: dict[int, tuple[Flow, ...]]
    """Rank -> what it sends and receives."""
    seconds: float
    """How long it took to find out."""

    @property
    def heaviest(self) -> int:
        """The rank that needs most on its device."""
        return max(self.memory, key=lambda rank: self.memory[rank].total)


def dry_run(config: TrainConfig, world_size: int) -> DryRun:
    """Rehearses a training step of a validated configuration on `world_size` ranks."""
    check_backend(config.compile)
    started = time.perf_counter()
    ranks = _candidates(config, world_size)
    rehearsals = rehearse_all(config, world_size, ranks)
    return DryRun(
        world_size=world_size,
        memory={rank: rehearsal.memory for rank, rehearsal in zip(ranks, rehearsals, strict=True)},
        host_memory={rank: rehearsal.host_memory for rank, rehearsal in zip(ranks, rehearsals, strict=True)},
        traffic={rank: rehearsal.traffic for rank, rehearsal in zip(ranks, rehearsals, strict=True)},
        seconds=time.perf_counter() - started,
    )


def dry_run_text(config: TrainConfig, world_size: int) -> str:
    """What `titan-train --dry-run` prints for a validated configuration on `world_size` ranks."""
    result = dry_run(config, world_size)
    rank, width = result.heaviest, terminal_width()
    offload = config.parallel.cpu_offload or config.optimizer.state_offload
    lines = [
        f"A training step on {world_size} rank{'s' if world_size > 1 else ''} of fake tensors, in "
        f"{result.seconds:,.1f} s. Rank {rank} needs most{' on its GPU' if offload else ''}:",
        *_table(result.memory[rank]),
    ]
    if offload:
        lines += [f"In the host's memory, rank {rank} needs beside:", *_table(result.host_memory[rank])]
    lines += _float8_lines(result.traffic[rank])
    if len(result.memory) > 1:
        lines.append("The ranks that could need most, the first of each pipeline rank tried:")
        for tried, memory in result.memory.items():
            host = f"  and {human(result.host_memory[tried].total)} of the host's" if offload else ""
            lines.append(f"  rank {tried:<9}{human(memory.total):>12}{host}")
    return "\n".join(wrap(line, width) for line in [*lines, *(f"note: {note}" for note in _assumptions(config))])


def _table(use: MemoryUse) -> list[str]:
    sizes = {field.name: getattr(use, field.name) for field in dataclasses.fields(use)}
    lines = [f"  {name:<14}{human(size):>12}  {_MEANING[name]}" for name, size in sizes.items()]
    return [*lines, f"  {'peak':<14}{human(use.total):>12}  all of them, when most is alive"]


def _float8_lines(traffic: tuple[Flow, ...]) -> list[str]:
    """Which collectives carry codes of float8, and how much of all that is."""
    coded = [flow for flow in traffic if flow.dtype == "uint8"]
    if not coded:
        return []
    sent, whole = (sum(flow.sent_bytes for flow in flows) for flows in (coded, traffic))
    return [
        f"It sends {human(whole)}, of which {human(sent)} are codes of float8 (and what FSDP packs with them):",
        *map(_flow_line, coded),
    ]


def _flow_line(flow: Flow) -> str:
    what = f"{flow.axis:<14}{flow.kind:<16}{flow.dtype:<8}"
    return f"  {what}{flow.count:>8,} x{human(flow.sent_bytes):>14}  {flow.cause}"


_MEANING = {
    "parameters": "this rank's shards, and buffers",
    "gradients": "shards, and whole ones that wait for their reduction",
    "optimizer": "its state",
    "activations": "what forward keeps for backward, and what both are working on",
    "communication": "parameters gathered or cast, buffers of reductions and of the pipeline",
    "other": "the batch, clipping, the optimizer's own work",
}


def _candidates(config: TrainConfig, world_size: int) -> list[int]:
    """The first rank of each pipeline rank that may need most; other ranks of its stages hold as much or less."""
    degrees = resolve_degrees(config.parallel, world_size)
    if degrees.pp == 1:
        return [0]
    with torch.device("meta"):
        model = config.model.build()
    roles = resolve_roles(model, config.model.roles())
    costs = flops_per_token(config.model, config.training.seq_len)
    stages = describe_stages(model, roles, config.parallel, costs)
    micro_batches = full_share(config, degrees).micro_batches
    order = compute_order(config.parallel, micro_batches)
    in_flight = [most_in_flight(order[rank], {s.number: s.cost_share for s in stages}) for rank in range(degrees.pp)]
    parameters = [_parameters(stages, rank) for rank in range(degrees.pp)]
    # The ends hold the embedding and the head, and of the ranks between them those with most of anything.
    between = range(1, degrees.pp - 1)
    most = {max(between, key=numbers.__getitem__) for numbers in (in_flight, parameters) if between}
    return [rank * (world_size // degrees.pp) for rank in sorted({0, degrees.pp - 1} | most)]


def _parameters(stages: tuple[Stage, ...], rank: int) -> int:
    return sum(stage.parameters for stage in stages if stage.rank == rank)


def _assumptions(config: TrainConfig) -> list[str]:
    notes = [
        "bytes of live tensors; allocators, the GPU's context and communication libraries need some more",
        "attention is that of the CPU's kernel, whose memory grows with the sequence as that of a flash kernel does",
    ]
    if config.data.confine_attention:
        notes.append("attention confined to documents builds a mask of S x S for each row, on the CPU as on a GPU")
    if config.model.moe is not None:
        notes.append("tokens are taken to be dealt evenly to experts; a rank with popular ones needs more")
    if config.quant.recipe in ("mxfp8", "nvfp4"):
        notes.append(f"{config.quant.recipe} was emulated, which works on wider copies than its kernels do")
    if config.compile.enabled:
        notes.append("nothing was compiled; compiled blocks usually keep fewer activations")
    if config.parallel.cpu_offload:
        notes.append(
            "parameters, reduced gradients and the optimizer's state are in the host's memory; what is on its way "
            "between host and GPU is counted on one side only"
        )
    if config.optimizer.state_offload:
        notes.append("the optimizer's state is in the host's memory, pinned; what is on its way is counted there only")
    return notes
