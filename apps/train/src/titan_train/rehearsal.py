"""One training step of one rank on fake ranks and fake tensors: the trainer's own code, in a world that costs nothing.

Equal micro-batches do the same. So two steps with few of them are rehearsed, and what a step with more needs follows:
bytes and counts grow by as much for each further micro-batch, once a pipeline is full. Likewise what is sent grows by
as much for each further block.

What is not what a GPU would run, and who reports it to the user says so: attention runs the CPU's kernel, whose
memory grows as that of the GPUs' flash kernels does; nothing is compiled, since compiled code needs values; tokens
are dealt evenly to experts.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titan_core.config import CompileConfig, RematConfig
from titan_core.degrees import resolve_degrees
from titan_core.mesh import build_meshes
from titan_core.optim import OptimizerState, build_optimizer
from titan_core.pipelining.stages import stage_count
from titan_core.planning.fake_world import fake_tensors, fake_world
from titan_core.planning.memory_use import MemoryRecorder, MemoryUse
from titan_core.planning.traffic import Flow, TrafficRecorder
from titan_models.facts import GPU_CHUNK_TOKENS
from titan_train.build import full_share, input_names, lay_out
from titan_train.config import TrainConfig
from titan_train.environment import Environment
from titan_train.forked import in_processes
from titan_train.rows import Rows


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a step of one rank needs."""

    memory: MemoryUse
    """On the device, when most is alive there."""
    host_memory: MemoryUse
    """In the host's memory, if anything is offloaded, when most is alive there."""
    traffic: tuple[Flow, ...]
    """What the rank sends and receives in the step."""


def rehearse(config: TrainConfig, world_size: int, rank: int, micro_batches: int | None = None) -> Rehearsal:
    """A step of `rank`, with the configuration's number of micro-batches or another; needs a process of its own.

    Fewer micro-batches keep the shape of the last one, which may have fewer rows than the others.
    """
    torch.set_num_threads(1)
    config = rehearsable(config)
    with fake_environment(config, world_size, rank) as env:
        return measured_step(config, env, micro_batches, tensors=fake_tensors())


def measured_step(
    config: TrainConfig,
    env: Environment,
    micro_batches: int | None = None,
    *,
    tensors: AbstractContextManager[None] | None = None,
) -> Rehearsal:
    """Builds a model and an optimizer, and trains a step on a batch of zeros.

    The weights are whatever was in memory. `tensors`: entered once the model is laid out.
    """
    laid_out = lay_out(config, env)
    layout, roles = laid_out.layout, laid_out.roles
    with tensors or contextlib.nullcontext():
        laid_out.give_memory(env.device)
        optimizer = build_optimizer(layout.model, roles, config.optimizer)
        state = OptimizerState(optimizer, layout.model).state_dict()
        rows = _rows(full_share(config, env.degrees), micro_batches)
        batch = _batch(config, rows)

        memory, traffic, offload = MemoryRecorder(), TrafficRecorder(env.meshes), config.parallel.cpu_offload
        with traffic, memory:
            memory.hold("parameters", layout.model.buffers())
            memory.hold("parameters", layout.model.parameters(), host=offload)
            memory.hold("optimizer", state.values(), host=offload or config.optimizer.state_offload)
            memory.hold("other", batch.values())
            del state
            memory.category = "activations"
            layout.accumulate(batch, divisor=1.0)
            memory.hold("gradients", [parameter.grad for parameter in layout.model.parameters()], host=offload)
            memory.category, memory.host = "other", offload
            laid_out.update(optimizer, 1, env.stages)
    return Rehearsal(memory=memory.peak(), host_memory=memory.peak(host=True), traffic=tuple(traffic.flows()))


@contextlib.contextmanager
def fake_environment(config: TrainConfig, world_size: int, rank: int) -> Iterator[Environment]:
    """Where rank `rank` of a fake world finds itself."""
    device, degrees = torch.device("cpu"), resolve_degrees(config.parallel, world_size)
    if world_size == 1:
        yield Environment(device, rank, degrees, None)
        return
    with fake_world(rank, world_size):
        meshes = build_meshes(degrees, device.type, experts=config.model.moe is not None)
        yield Environment(device, rank, degrees, meshes)


_GPU_ONLY = ("mxfp8", "nvfp4")


def rehearsable(config: TrainConfig) -> TrainConfig:
    """`config` without what fake tensors cannot do, and with what would be chosen on the device it is for."""
    chunk = config.model.loss_chunk_tokens or (None if config.device == "cpu" else GPU_CHUNK_TOKENS)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, loss_chunk_tokens=chunk, attention_kernel="sdpa"),
        schedule=dataclasses.replace(config.schedule, total_steps=config.schedule.total_steps or 1),
        parallel=dataclasses.replace(config.parallel, async_tp=False),  # the compiler's, and sends the same
        compile=CompileConfig(),
        remat=RematConfig() if config.remat.mode == "budget" else config.remat,
        # The kernels of these are of GPUs only.
        quant=dataclasses.replace(config.quant, emulate=config.quant.emulate or config.quant.recipe in _GPU_ONLY),
    )


def rehearse_all(config: TrainConfig, world_size: int, ranks: Sequence[int]) -> list[Rehearsal]:
    """The step of each of `ranks`, found from as few micro-batches as show it; processes share the work."""
    share = full_share(config, resolve_degrees(config.parallel, world_size))
    counts, wanted = _telling_counts(config, share), share.micro_batches
    tasks = [(config, world_size, rank, count) for rank in ranks for count in counts]
    found = in_processes(rehearse, tasks, "rehearsing a step")
    if len(counts) == 1:
        return found
    return [
        _extended(few, more, (wanted - counts[0]) / (counts[1] - counts[0]))
        for few, more in zip(found[::2], found[1::2], strict=True)
    ]


def rehearse_traffic(config: TrainConfig, world_size: int, rank: int) -> tuple[Flow, ...]:
    """What a step of `rank` sends and receives, found from as few blocks and micro-batches as show it."""
    if config.parallel.pp_schedule == "1F1B" and config.parallel.pp_schedule_csv is None and config.parallel.pp > 1:
        # It sends what GPipe sends, in another order, but needs a micro-batch for each stage.
        config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, pp_schedule="GPipe"))
    depths, layers = _telling_depths(config), config.model.layers
    found = [
        rehearse_all(
            dataclasses.replace(config, model=dataclasses.replace(config.model, layers=depth)), world_size, [rank]
        )
        for depth in depths
    ]
    if len(depths) == 1:
        return found[0][0].traffic
    (few,), (more,) = found
    return _extended(few, more, (layers - depths[0]) / (depths[1] - depths[0])).traffic


def _telling_depths(config: TrainConfig) -> list[int]:
    """The numbers of blocks to rehearse: two from which the wanted number follows, or that number alone."""
    layers, moe = config.model.layers, config.model.moe
    if config.parallel.pp > 1 or config.optimizer.name == "muon":
        return [layers]  # stages, and the ranks that work on a matrix, are chosen by all blocks
    least = 3 + (moe.first_dense_layers if moe else 0)  # neither the first nor the last block need be like the others
    few = least + (layers - least) % config.remat.every
    more = few + config.remat.every
    return [layers] if layers <= more else [few, more]


def _telling_counts(config: TrainConfig, share: Rows) -> list[int]:
    """The numbers of micro-batches to rehearse: two from which the wanted number follows, or that number alone."""
    micro_batches = share.micro_batches
    pp, stages = config.parallel.pp, stage_count(config.parallel)
    if config.parallel.pp_schedule_csv and pp > 1:
        return [micro_batches]  # its actions name the micro-batches
    if pp == 1:
        few = 3 if share.rows % share.micro_batch_size else 2  # two of full size, the second of which finds gradients
        more = few + 1
    elif config.parallel.pp_schedule == "GPipe":
        few, more = 2, 3  # all are in flight, however many there are
    elif stages == pp:
        few, more = pp + 1, pp + 2  # more than are in flight, so that gradients exist when most are
    else:  # schedules of several stages a rank repeat after so many
        few, more = stages + pp, stages + 2 * pp
    return [micro_batches] if micro_batches <= more else [few, more]


def _extended(few: Rehearsal, more: Rehearsal, factor: float) -> Rehearsal:
    """On the line through both, at `factor` times their distance from the first."""

    def extend(first: int, second: int) -> int:
        return round(first + (second - first) * factor)

    def extend_memory(first: MemoryUse, second: MemoryUse) -> MemoryUse:
        names = [field.name for field in dataclasses.fields(MemoryUse)]
        return MemoryUse(**{name: extend(getattr(first, name), getattr(second, name)) for name in names})

    return Rehearsal(
        memory=extend_memory(few.memory, more.memory),
        host_memory=extend_memory(few.host_memory, more.host_memory),
        traffic=tuple(_extended_flows(few.traffic, more.traffic, extend)),
    )


def _extended_flows(few: Iterable[Flow], more: Iterable[Flow], extend: Any) -> Iterable[Flow]:
    before = {(flow.axis, flow.kind, flow.cause, flow.dtype): flow for flow in few}
    for flow in more:
        first = before.get((flow.axis, flow.kind, flow.cause, flow.dtype))
        numbers = ("count", "sent_bytes", "received_bytes")
        yield dataclasses.replace(
            flow, **{name: extend(getattr(first, name) if first else 0, getattr(flow, name)) for name in numbers}
        )


def _rows(share: Rows, micro_batches: int | None) -> int:
    left_out = 0 if micro_batches is None else share.micro_batches - micro_batches
    return share.rows - left_out * share.micro_batch_size


def _batch(config: TrainConfig, rows: int) -> dict[str, Tensor]:
    shape = rows, config.training.seq_len
    batch = {name: torch.zeros(shape, dtype=torch.int64) for name in input_names(config)}
    if config.model.moe is not None:
        batch["row_weights"] = torch.zeros(rows, dtype=torch.float64)
    return batch
