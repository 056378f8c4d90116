"""Every rule that spans fields, checked before torch is imported or a process group starts."""

import difflib
import platform

from titan_core.degrees import Degrees, degree_problems, resolve_degrees
from titan_core.limits import Shapes, limit_problems
from titan_core.roles import ROLES
from titan_data.mixture_config import MixtureConfig
from titan_data.sft_config import SFTConfig
from titan_data.stream_config import StreamConfig
from titan_models.hugging_face import to_hugging_face
from titan_models.shape import ModelConfigError
from titan_train.config import DataSection, TrainConfig
from titan_train.rows import share_rows

_PLATFORMS = ("Linux", "Darwin")


class ConfigError(ValueError):
    """The configuration cannot be run; the message lists every problem with its remedy."""


def problems(config: TrainConfig, world_size: int) -> list[str]:
    """Why `config` cannot run on `world_size` ranks: one sentence each, with a remedy; empty if it can."""
    return [
        *_platform_problems(),
        *(ranges := _range_problems(config)),
        *([] if ranges else config.model.problems()),
        *config.precision.problems(),
        *config.quant.problems(),
        *config.lora.problems(),
        *config.optimizer.problems(),
        *config.optimizer.offload_problems(config.device, config.parallel),
        *config.schedule.problems(),
        *config.guard.problems(),
        *config.metrics.problems(),
        *config.spans.problems(),
        *config.profiling.problems(),
        *config.watchdog.problems(),
        *config.debug.problems(),
        *_recording_problems(config, world_size),
        *_data_problems(config),
        *config.validation.problems(),
        *_replica_problems(config),
        *_role_problems(config),
        *_checkpoint_problems(config),
        *_export_problems(config),
        *config.evaluation.problems(),
        *_attention_problems(config),
        *_expert_problems(config),
        *([] if ranges else _batch_problems(config, world_size)),
    ]


def validate(config: TrainConfig, world_size: int) -> None:
    """Raises `ConfigError` with all problems at once, if there are any."""
    if found := problems(config, world_size):
        listed = "".join(f"\n  - {problem}" for problem in found)
        raise ConfigError(f"This configuration cannot run on {_ranks(world_size)}:{listed}")


def check_vocabulary(config: TrainConfig, tokenizer_size: int) -> None:
    """Raises `ConfigError` if the tokenizer has ids that the model has no row for."""
    if tokenizer_size > config.model.vocab_size:
        raise ConfigError(
            f"The tokenizer has {tokenizer_size} entries, but model.vocab_size is {config.model.vocab_size}; set "
            f"--model.vocab-size {tokenizer_size} or more, or choose another --data.tokenizer."
        )


def _platform_problems() -> list[str]:
    if platform.system() in _PLATFORMS:
        return []
    return [f"{platform.system()} is not supported; use Linux or macOS (on Windows: WSL 2)."]


# What a number may be, both ends included. The upper ends are far above anything trained so far: they catch slips of
# the keyboard before memory is asked for.
_RANGES: dict[str, tuple[float, float]] = {
    "model.vocab_size": (1, 2**24),
    "model.dim": (1, 2**20),
    "model.layers": (1, 10_000),
    "model.heads": (1, 2**16),
    "model.kv_heads": (1, 2**16),
    "model.head_dim": (2, 2**14),
    "model.hidden_dim": (1, 2**22),
    "model.norm_eps": (0, 1),
    "model.rope_theta": (1, 1e12),
    "model.init_std": (0, 100),
    "data.vocab_size": (1, 2**24),
    "data.tokenize_workers": (1, 1024),
    "training.seq_len": (1, 2**24),
    "training.global_batch_size": (1, 2**24),
    "training.micro_batch_size": (1, 2**24),
    "training.steps": (1, 2**40),
    "training.seed": (-(2**63), 2**63 - 1),
    "export.every": (0, 2**40),
    "export.shard_bytes": (1, 2**60),
    "optimizer.lr": (0, 1e6),
    "optimizer.beta1": (0, 0.999999),
    "optimizer.beta2": (0, 0.9999999),
    "optimizer.eps": (0, 1),
    "optimizer.weight_decay": (0, 1e3),
    "optimizer.max_grad_norm": (0, 1e12),
}


def _export_problems(config: TrainConfig) -> list[str]:
    if config.export.format == "none":
        if config.evaluation.command is not None:
            return ["evaluation.command judges exports, and there are none; add --export.format huggingface."]
        return []
    found = []
    if not config.checkpoint.enabled:
        found.append(
            f"export.format {config.export.format} is made from checkpoints, but checkpoint.enabled is off; leave it."
        )
    if config.export.format == "peft" and config.lora.rank == 0:
        found.append("export.format peft writes LoRA adapters, and lora.rank is 0; give one, or use huggingface.")
    try:
        to_hugging_face(config.model)
    except ModelConfigError as error:
        found.append(f"export.format {config.export.format}: {error}")
    return found


# Parts of a checkpoint that a run can have anew.
_EXCLUDABLE = ("optimizer", "data", "guard", "rng")


def _range_problems(config: TrainConfig) -> list[str]:
    found = []
    for name, (low, high) in _RANGES.items():
        section, field = name.split(".")
        value = getattr(getattr(config, section), field)
        if value is not None and not low <= value <= high:  # which NaN is not either
            found.append(f"{name} is {value}; it must lie between {low:,} and {high:,}.")
    places = {
        "output": config.output,
        "checkpoint.directory": config.checkpoint.directory,
    }
    found += [f"{name} is empty; name a place, or leave it out." for name, value in places.items() if value == ""]
    return found


def _checkpoint_problems(config: TrainConfig) -> list[str]:
    found = config.checkpoint.problems()
    if config.guard.policy == "rewind" and not config.checkpoint.enabled:
        found.append("guard.policy rewind goes back to checkpoints, but checkpoint.enabled is off; leave it on.")
    elif config.guard.policy == "rewind" and not config.checkpoint.saves_on_the_way:
        found.append(
            "guard.policy rewind goes back to checkpoints, and none is saved before the last step; give "
            "--checkpoint.every or --checkpoint.every-minutes."
        )
    if wrong := sorted(set(config.checkpoint.exclude) - set(_EXCLUDABLE)):
        found.append(
            f"checkpoint.exclude names {', '.join(wrong)}; choose among {', '.join(_EXCLUDABLE)}. (To take nothing but "
            "the weights, start a new run with --checkpoint.init-from.)"
        )
    return found


def _replica_problems(config: TrainConfig) -> list[str]:
    replica = config.replica
    found = replica.problems()
    if not replica.enabled:
        return found
    if config.output is None:
        found.append("Replica groups share a run directory; name it with --output, the same for all.")
    if config.data.kind == "stream":
        found.append(
            "data.kind stream has no rows to deal anew when a replica group comes or goes; use text, mixture or sft."
        )
    if config.guard.policy == "rewind":
        found.append(
            "guard.policy rewind goes back to a checkpoint, which replica groups may not all see; use raise or skip."
        )
    if config.parallel.cpu_offload and config.device != "cpu":
        found.append(
            "parallel.cpu_offload keeps gradients in the host's memory, and replica groups on GPUs send them from "
            "there; leave one of them out."
        )
    every, steps = replica.averaging.every, config.training.steps
    if replica.averaging.method != "none" and every >= 1 and steps % every:
        found.append(
            f"training.steps {steps} is no multiple of replica.averaging.every {every}, so the run would end with "
            "groups that differ; choose a multiple."
        )
    return found


def _role_problems(config: TrainConfig) -> list[str]:
    found = []
    known = (*ROLES, "bias")
    for role in config.optimizer.no_decay:
        if role not in known:
            close = difflib.get_close_matches(role, known, 1)
            hint = f"; did you mean {close[0]!r}" if close else ""
            found.append(f"optimizer.no_decay names the unknown role {role!r}{hint}. Known: {', '.join(known)}.")
    return found


def _attention_problems(config: TrainConfig) -> list[str]:
    """Where the kernel that is asked for would not be used."""
    kernel, dtype = config.model.attention_kernel, config.precision.param_dtype or config.precision.master_dtype
    if kernel == "sdpa":
        return []
    found = []
    if not config.data.confine_attention:
        found.append(
            f"model.attention_kernel {kernel} confines attention to documents, and data.confine_attention is off; "
            "leave it out."
        )
    if config.parallel.cp > 1 and config.parallel.cp_method != "ulysses":
        found.append(
            f"model.attention_kernel {kernel} has no effect with parallel.cp_method {config.parallel.cp_method}, which "
            "has a kernel of its own; leave it out, or choose ulysses."
        )
    if kernel == "varlen" and config.device == "cuda" and dtype != "bfloat16":
        found.append(
            f"model.attention_kernel varlen computes in half precision on a GPU, and here it is {dtype}; set "
            "--precision.param-dtype bfloat16, or choose flex."
        )
    return found


def _expert_problems(config: TrainConfig) -> list[str]:
    """Where torch's grouped product, if it is insisted on, does not take the experts' weights."""
    moe, dtype = config.model.moe, config.precision.param_dtype or config.precision.master_dtype
    if moe is None or moe.grouped_mm != "grouped":
        return []
    itemsize = {"bfloat16": 2, "float32": 4, "float64": 8}[dtype]
    if dtype != "float64" and all(width * itemsize % 16 == 0 for width in (config.model.dim, moe.hidden_dim)):
        return []
    return [
        "model.moe.grouped_mm grouped takes no float64, and only widths that are multiples of 16 bytes; here it is "
        f"{dtype}, model.dim {config.model.dim} and model.moe.hidden_dim {moe.hidden_dim}. Use auto or loop."
    ]


def _batch_problems(config: TrainConfig, world_size: int) -> list[str]:
    if found := degree_problems(config.parallel, world_size):
        return found
    batch, degrees = config.training.global_batch_size, resolve_degrees(config.parallel, world_size)
    if 0 < batch < degrees.dp * config.replica.groups and config.replica.enabled:
        return [
            f"training.global_batch_size {batch} is smaller than {config.replica.groups} replica groups of "
            f"{degrees.dp} data-parallel ranks each, so some would have nothing to read; raise it, or start fewer."
        ]
    if batch < degrees.dp:
        return [
            f"training.global_batch_size {batch} is smaller than the {degrees.dp} data-parallel ranks (dp_replicate x "
            f"dp_shard), so some would have nothing to read; raise it to {degrees.dp} or more, or start fewer ranks."
        ]
    return [
        *_stream_problems(config, degrees),
        *_gather_problems(config, degrees),
        *_limit_problems(config, degrees),
    ]


def _gather_problems(config: TrainConfig, degrees: Degrees) -> list[str]:
    """Where weights are not gathered, or not so that float8 will do."""
    if not config.quant.float8_gather:
        return []
    found = []
    if degrees.dp_shard * degrees.cp == 1:
        found.append(
            "quant.float8_gather is about weights that are sharded, and parallel.dp_shard is 1; raise it, or leave "
            "quant.float8_gather out."
        )
    if config.parallel.cpu_offload or type(config.parallel.reshard_after_forward) is int:
        found.append(
            "quant.float8_gather goes neither with parallel.cpu_offload nor with a number as "
            "parallel.reshard_after_forward; leave one of them out."
        )
    return found


def _recording_problems(config: TrainConfig, world_size: int) -> list[str]:
    found = []
    if config.debug.locate_nonfinite and config.compile.enabled:
        found.append("debug.locate_nonfinite sees no modules inside of compiled blocks; leave out compile.enabled.")
    for name in ("snapshot_at", "snapshot_on_oom"):
        if getattr(config.profiling, name) and config.device == "cpu":
            found.append(f"profiling.{name} photographs the memory of a GPU, and device is cpu; leave it out.")
    for name, ranks in {
        "spans.ranks": config.spans.ranks,
        "profiling.profile_ranks": config.profiling.profile_ranks,
    }.items():
        if beyond := [rank for rank in ranks if rank >= world_size]:
            found.append(f"{name} names rank {beyond[0]}, and the run has {_ranks(world_size)}, counted from 0.")
    if config.debug.check_replicas_every and world_size == 1:
        found.append("debug.check_replicas_every compares copies on several ranks, and there is one; leave it out.")
    return found


def _stream_problems(config: TrainConfig, degrees: Degrees) -> list[str]:
    """Where whole streams cannot be dealt to the data-parallel ranks."""
    if config.data.kind != "stream":
        return []
    streams, batch, dp = config.data.stream.streams, config.training.global_batch_size, degrees.dp
    found = []
    if streams < 1 or batch % streams:
        found.append(
            f"data.stream.streams {streams} does not divide training.global_batch_size {batch}, of which each stream "
            "gives equally many rows; choose a divisor."
        )
    elif streams % dp:
        found.append(
            f"The {dp} data-parallel ranks (dp_replicate x dp_shard) do not divide data.stream.streams {streams}, of "
            "which each rank reads whole ones; choose a multiple."
        )
    elif share_rows(config.training, config.parallel, degrees).rows * dp != batch:
        found.append(
            f"training.micro_batch_size does not divide the {batch // dp} rows of each data-parallel rank, and streams "
            "have no rows to pad with; choose a divisor."
        )
    elif config.data.loader.workers > streams // dp:
        found.append(
            f"data.loader.workers {config.data.loader.workers} are more than the {streams // dp} streams that a rank "
            "reads; lower it."
        )
    return found


def _data_problems(config: TrainConfig) -> list[str]:
    data = config.data
    found = data.problems() + data.loader.problems()
    if data.loader.pin_memory and config.device == "cpu":
        found.append("data.loader.pin_memory is on, and there is no GPU to copy to; leave it out.")
    sections = {"mixture": MixtureConfig(), "sft": SFTConfig(), "stream": StreamConfig()}
    for kind, default in sections.items():
        if kind != data.kind and getattr(data, kind) != default:
            found.append(
                f"data.{kind} is set, and data.kind is {data.kind!r}; add --data.kind {kind}, or leave it out."
            )
    if data.kind == "sft":
        found += data.sft.problems()
    if data.kind == "mixture":
        found += data.mixture.problems()
        if data.source != DataSection.source:
            found.append("data.source is set, and a mixture reads data.mixture.sources; leave it out.")
    if data.kind in ("sft", "stream") and data.tokenize_workers != 1:
        found.append(f"data.tokenize_workers has no effect on data.kind {data.kind}; leave it out.")
    return found


def _limit_problems(config: TrainConfig, degrees: Degrees) -> list[str]:
    model = config.model
    shapes = Shapes(
        heads=model.heads,
        kv_heads=model.kv_heads,
        layers=model.layers,
        vocab_size=model.vocab_size,
        seq_len=config.training.seq_len,
        micro_batches=share_rows(
            config.training, config.parallel, degrees, groups=max(1, config.replica.groups)
        ).micro_batches,
        experts=model.moe.experts if model.moe else None,
        tied=model.tie_embeddings,
    )
    # On a login node `auto` is what will be on the others; only what is certain is refused.
    device = "cuda" if config.device == "auto" else config.device
    return limit_problems(config.parallel, degrees, shapes, remat=config.remat, compiling=config.compile, device=device)


def _ranks(world_size: int) -> str:
    return "1 rank" if world_size == 1 else f"{world_size} ranks"
