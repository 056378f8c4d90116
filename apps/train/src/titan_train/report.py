"""What a run tells the person who started it: an overview before, an ending and what to try next after."""

from titan_core.degrees import Degrees
from titan_core.text import human
from titan_models.facts import parameter_count
from titan_train.config import TrainConfig
from titan_train.rows import Rows
from titan_train.run_directory import checkpoint_directory, own_folder


def overview(
    config: TrainConfig,
    degrees: Degrees,
    *,
    device: str,
    data: str,
    share: Rows,
    gradient_bytes: int,
    rewrites: str = "",
) -> str:
    """The run in a few lines: model, data, batch and layout, and where it writes."""
    batch, seq_len = config.training.global_batch_size, config.training.seq_len
    rows, micro_batches = share.rows * degrees.dp * config.replica.groups, share.micro_batches
    padding = rows - batch
    lines = [
        f"model {parameter_count(config.model):,} parameters, {config.model.layers} layers of width {config.model.dim}",
        *([rewrites] if rewrites else []),
        data,
        f"batch {batch} sequences of {seq_len} tokens = {batch * seq_len:,} tokens a step; on each rank "
        f"{micro_batches} micro-batch{'es' if micro_batches > 1 else ''} of up to {share.micro_batch_size}",
        f"layout {_layout(degrees)} on {device}",
        f"run directory {config.output}",
    ]
    if padding:
        wasted = padding / rows
        lines.append(
            f"note: {batch} sequences do not fill the micro-batches of {degrees.dp} data-parallel ranks; {padding} "
            f"of {rows} rows a step are padding, {wasted:.0%} of the work is wasted"
        )
    if gradient_bytes:
        lines.append(
            f"note: gradients are reduced with the last micro-batch only, which keeps "
            f"{human(gradient_bytes)} of whole gradients on each rank (parallel.grad_sync)"
        )
    return "\n".join(lines)


def ending(config: TrainConfig, step: int, steps: int, seconds: float) -> str:
    """What was done, where it is, and what to try next."""
    where, same = own_folder(config), f"--config {own_folder(config)}/config.json"
    done = f"{steps} steps in {seconds:,.1f} s"
    saved = config.checkpoint.enabled
    if step < config.training.steps:
        onward = f"Start it again with {same} and it goes on from there." if saved else "Nothing was saved."
        return f"Interrupted after step {step} of {config.training.steps} ({done}). {onward}"
    weights = f"weights in {checkpoint_directory(config)}" if saved else "no weights were saved"
    return (
        f"Finished step {step} ({done}). Metrics are in {where}/metrics.jsonl, {weights}.\n"
        f"Try next: {same} --training.steps {2 * step} trains this model for longer, --data.source FOLDER "
        "reads your own text or JSONL, and torchrun --nproc-per-node 2 -m titan_train shares the work of two processes."
    )


def already_finished(config: TrainConfig, step: int) -> str:
    """Why nothing is left to do."""
    return (
        f"This run is finished: {config.output} holds a checkpoint of step {step}, and training.steps is "
        f"{config.training.steps}. Raise --training.steps to train for longer."
    )


def _layout(degrees: Degrees) -> str:
    names = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
    used = [f"{name} {getattr(degrees, name)}" for name in names if getattr(degrees, name) > 1]
    ranks = "one process" if degrees.world_size == 1 else f"{degrees.world_size} ranks"
    return f"{ranks}: {' x '.join(used)}" if used else ranks
