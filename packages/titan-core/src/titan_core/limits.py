"""Where a layout does not fit the model, the batch or the device: every rule, with its remedy. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass

from titan_core.config import CompileConfig, ParallelConfig, RematConfig
from titan_core.degrees import Degrees, divisors
from titan_core.pipelining.schedule_file import read_schedule
from titan_core.pipelining.stages import SCHEDULES, pipeline_problems, stage_count


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What a layout must divide: the model's shapes, and those of a rank's share of a batch."""

    heads: int
    kv_heads: int
    layers: int
    vocab_size: int
    seq_len: int
    micro_batches: int
    """Micro-batches a step on each rank."""
    experts: int | None = None
    """Experts a layer, None for a dense model."""
    tied: bool = False
    """Whether the head shares the embedding's weight."""


def limit_problems(
    config: ParallelConfig,
    degrees: Degrees,
    shapes: Shapes,
    *,
    remat: RematConfig = RematConfig(),
    compiling: CompileConfig = CompileConfig(),
    device: str = "cpu",
) -> list[str]:
    """Why the layout cannot work: one sentence each, with a remedy; empty if it can.

    `device`: the type of device, `cpu` or `cuda`.
    """
    return [
        *_tensor(config, degrees, shapes),
        *_async_tensor(config, degrees, compiling, device),
        *_context(config, degrees, shapes),
        *_experts(config, degrees, shapes),
        *pipeline_problems(config, layers=shapes.layers, micro_batches=shapes.micro_batches),
        *_pipeline(config, degrees, shapes, remat, compiling),
        *_fsdp(config, degrees, device),
        *remat.problems(),
        *_compiling(config, degrees, remat, compiling),
    ]


def _tensor(config: ParallelConfig, degrees: Degrees, shapes: Shapes) -> Iterator[str]:
    tp = degrees.tp
    if tp == 1:
        if not config.sequence_parallel:
            yield "parallel.sequence_parallel is switched off, but there is no tensor parallelism; leave it out."
        return
    for name, number in (("heads", shapes.heads), ("kv_heads", shapes.kv_heads)):
        if number % tp:
            yield f"parallel.tp {tp} does not divide model.{name} {number}; use one of {divisors(number)}."
    if (tp - 1) * -(-shapes.vocab_size // tp) >= shapes.vocab_size:
        yield f"parallel.tp {tp} leaves a rank without a row of the model.vocab_size {shapes.vocab_size}; lower it."
    parts = tp * degrees.cp
    if config.sequence_parallel and shapes.seq_len % parts:
        cut = f"parallel.tp {tp} cuts" if degrees.cp == 1 else f"parallel.tp {tp} x parallel.cp {degrees.cp} cut"
        otherwise = "lower parallel.tp" if shapes.experts else "switch parallel.sequence_parallel off"
        yield (
            f"{cut} a sequence into {parts} parts, which does not divide training.seq_len {shapes.seq_len}; use a "
            f"multiple of {parts}, or {otherwise}."
        )


def _async_tensor(config: ParallelConfig, degrees: Degrees, compiling: CompileConfig, device: str) -> Iterator[str]:
    if not config.async_tp:
        return
    if degrees.tp == 1:
        yield "parallel.async_tp has no effect without tensor parallelism; set parallel.tp to 2 or more."
        return
    if device != "cuda":
        yield (
            "parallel.async_tp needs GPUs whose memory the others can read (symmetric memory over NVLink), and this "
            f"run is on {device}; leave it out."
        )
    if not compiling.enabled:
        yield "parallel.async_tp is done by the compiler; add --compile.enabled."
    elif compiling.backend != "inductor":
        yield f"parallel.async_tp is done by inductor, not by {compiling.backend}; leave out --compile.backend."
    if not config.sequence_parallel:
        yield "parallel.async_tp overlaps what sequence parallelism sends; leave parallel.sequence_parallel on."


def _context(config: ParallelConfig, degrees: Degrees, shapes: Shapes) -> Iterator[str]:
    cp = degrees.cp
    if cp == 1:
        for name in ("cp_method", "cp_load_balance"):
            if getattr(config, name) != getattr(ParallelConfig(), name):
                yield f"parallel.{name} is set, but there is no context parallelism; set parallel.cp, or leave it out."
        return
    parts = 2 * cp if config.cp_load_balance else cp
    if shapes.seq_len % parts:
        yield (
            f"parallel.cp {cp} cuts a sequence into {parts} parts{' to balance the load' if parts > cp else ''}, "
            f"which does not divide training.seq_len {shapes.seq_len}; use a multiple of {parts}."
        )
    if config.cp_method == "ulysses":
        for name, number in (("heads", shapes.heads), ("kv_heads", shapes.kv_heads)):
            if number % degrees.tp == 0 and number // degrees.tp % cp:
                yield (
                    f"parallel.cp_method ulysses spreads the {number // degrees.tp} model.{name} of each tp rank over "
                    f"{cp} ranks, which does not divide them; use ring or allgather, or another parallel.cp."
                )


def _experts(config: ParallelConfig, degrees: Degrees, shapes: Shapes) -> Iterator[str]:
    if shapes.experts is None:
        if degrees.ep > 1:
            yield f"parallel.ep is {degrees.ep}, but this model has no experts; leave it at 1."
        return
    if shapes.experts % degrees.ep:
        yield (
            f"parallel.ep {degrees.ep} does not divide the {shapes.experts} experts of model.moe; use one of "
            f"{divisors(shapes.experts)}."
        )
    if degrees.tp > 1 and not config.sequence_parallel:
        yield (
            "Without parallel.sequence_parallel every tp rank would send the same tokens to the experts; leave it on, "
            f"with a training.seq_len that is a multiple of {degrees.tp * degrees.cp}, or set parallel.tp to 1 and cut "
            "the experts with parallel.ep."
        )


def _pipeline(
    config: ParallelConfig, degrees: Degrees, shapes: Shapes, remat: RematConfig, compiling: CompileConfig
) -> Iterator[str]:
    if degrees.pp == 1:
        return
    if shapes.tied:
        yield (
            "parallel.pp puts the embedding and the head on different stages, but model.tie_embeddings lets them "
            "share a weight; set it to false, or parallel.pp to 1."
        )
    splits, name = SCHEDULES[config.pp_schedule].splits_backward, config.pp_schedule
    if config.pp_schedule_csv:
        if config.pp_schedule != ParallelConfig().pp_schedule:
            yield "parallel.pp_schedule has no effect beside parallel.pp_schedule_csv; leave one of them out."
        try:
            file = read_schedule(config.pp_schedule_csv)
        except ValueError as error:
            yield str(error)
            return
        yield from file.problems(pp=degrees.pp, stages=stage_count(config), micro_batches=shapes.micro_batches)
        splits, name = file.splits_backward, config.pp_schedule_csv
    if splits:
        yield from _split_backward(config, name, remat, compiling)
    if config.grad_sync == "every":
        yield "A pipeline reduces gradients once a step; leave parallel.grad_sync at auto or last."


def _split_backward(
    config: ParallelConfig, schedule: str, remat: RematConfig, compiling: CompileConfig
) -> Iterator[str]:
    apart = f"{schedule} computes gradients of weights apart from the others"
    whole = ", ".join(name for name, facts in SCHEDULES.items() if not facts.splits_backward)
    if compiling.enabled:
        yield f"{apart}, which compiled blocks cannot do; leave out --compile.enabled, or use one of {whole}."
    if remat.mode == "selective":
        yield (
            f"{apart}, and selective recomputation runs a block's backward only once; use --remat.mode full, or one of "
            f"{whole}."
        )
    if config.reshard_after_forward not in ("default", "never"):
        yield (
            f"{apart}, when parameters that are resharded are gone; leave parallel.reshard_after_forward at "
            f"default, or use one of {whole}."
        )


def _fsdp(config: ParallelConfig, degrees: Degrees, device: str) -> Iterator[str]:
    if config.cpu_offload and device == "cpu":
        yield "parallel.cpu_offload has no effect on a CPU, where everything is in the host's memory; leave it out."
    if config.cpu_offload and degrees.world_size == 1:
        yield "parallel.cpu_offload works through FSDP, which needs at least 2 ranks; start more, or leave it out."
    for name in ("grad_sync", "reshard_after_forward"):
        if degrees.world_size == 1 and getattr(config, name) != getattr(ParallelConfig(), name):
            yield f"parallel.{name} has no effect on one process; leave it out, or start more."
    policy, ranks = config.reshard_after_forward, degrees.dp_shard * degrees.cp
    if not isinstance(policy, int):
        return
    if degrees.tp * degrees.pp * degrees.ep > 1:
        yield (
            "A number for parallel.reshard_after_forward works with dp_replicate, dp_shard and cp only: torch makes "
            "groups for it that all ranks would have to make alike; use always or never."
        )
    elif degrees.world_size > 1 and (policy < 2 or policy >= ranks or ranks % policy):
        fits = [d for d in divisors(ranks) if 1 < d < ranks]
        yield (
            f"parallel.reshard_after_forward {policy} is no part of the {ranks} ranks of dp_shard x cp; use "
            + (f"one of {fits}, " if fits else "")
            + "always or never."
        )


def _compiling(config: ParallelConfig, degrees: Degrees, remat: RematConfig, compiling: CompileConfig) -> Iterator[str]:
    if compiling.fullgraph and degrees.cp > 1 and config.cp_method == "ring":
        yield (
            "parallel.cp_method ring cannot be compiled, and --compile.fullgraph forbids to leave it out; use "
            "allgather or ulysses, or leave out --compile.fullgraph."
        )
    if compiling.fullgraph and degrees.ep > 1:
        yield (
            "With parallel.ep the host reads how many tokens to send, which cannot be compiled; leave out "
            "--compile.fullgraph."
        )
    if remat.mode == "budget" and not compiling.enabled:
        yield "remat.mode budget is done by the compiler; add --compile.enabled, or use selective."
    default = CompileConfig()
    if not compiling.enabled and compiling != default:
        yield "compile.backend and compile.fullgraph have no effect without --compile.enabled; add it, or drop them."
