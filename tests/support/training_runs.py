"""Whole training runs of a tiny model, in this process or on forked ranks."""

import dataclasses
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranks import RankFailure, run_ranks
from titan_core.config import OptimizerConfig, ParallelConfig, ScheduleConfig
from titan_data.loader_config import LoaderConfig
from titan_metrics.config import MetricsConfig
from titan_models.families.llama3 import Llama3Config
from titan_quant.config import MixedPrecision
from titan_train import cli, trainer
from titan_train.config import CheckpointSection, DataSection, TrainConfig, TrainingConfig
from titan_train.hooks import Hook
from titan_train.interrupt import Interrupt

TINY = TrainConfig(
    model=Llama3Config(vocab_size=300, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden_dim=64),
    data=DataSection(vocab_size=300, loader=LoaderConfig(prefetch=0)),
    training=TrainingConfig(seq_len=32, global_batch_size=12, steps=20, log_samples=True),
    optimizer=OptimizerConfig(lr=1e-3),
    schedule=ScheduleConfig(total_steps=20),
    device="cpu",
    checkpoint=CheckpointSection(every=0),
    metrics=MetricsConfig(log_every=1, console=False),
)

TINY_FLAGS = [
    "--model.vocab-size=300",
    "--data.vocab-size=300",
    "--model.dim=32",
    "--model.layers=1",
    "--model.hidden-dim=32",
    "--training.seq-len=32",
    "--training.global-batch-size=4",
    "--device=cpu",
]
"""The same of a smaller model, for the command line."""

FLOAT64 = MixedPrecision(master_dtype="float64")
BF16 = MixedPrecision(param_dtype="bfloat16")


def change(config: Any, **fields: Any) -> Any:
    """`config` with dotted fields replaced: `change(c, **{"training.steps": 3})`."""
    for name, value in fields.items():
        section, _, rest = name.partition(".")
        config = dataclasses.replace(
            config, **{section: change(getattr(config, section), **{rest: value}) if rest else value}
        )
    return config


def layout(**degrees: Any) -> dict[str, ParallelConfig]:
    """The change that sets the parallel section."""
    return {"parallel": ParallelConfig(**degrees)}


def train(config: TrainConfig, output: Path, world_size: int = 1, **changes: Any) -> list[dict[str, Any]]:
    """Trains and returns the lines of metrics.jsonl."""
    config = change(config, output=str(output), **changes)
    if world_size == 1:
        assert trainer.train(config, Interrupt(alone=True), name="test") is None
    else:
        assert run_ranks(world_size, trainer.train, config, Interrupt(alone=False), name="test") == [None] * world_size
    return metrics(output)


def train_until_killed(config: TrainConfig, output: Path, step: int, world_size: int = 1, **changes: Any) -> None:
    """Trains on forked ranks, each of which kills itself with SIGKILL at the end of `step`."""
    config = change(config, output=str(output), **changes)

    def run() -> None:
        build = trainer.build_hooks
        trainer.build_hooks = lambda *args: [*build(*args), Kill(step)]
        trainer.train(config, Interrupt(alone=False), name="test")

    try:
        run_ranks(world_size, run)
    except RankFailure:
        return
    raise AssertionError("the run ended before it was killed")


class Kill(Hook):
    """Ends its process as a power failure would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def end_step(self, step: Any) -> None:
        if step.number == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def metrics(output: Path) -> list[dict[str, Any]]:
    """The logged steps of a run."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def curve(lines: list[dict[str, Any]], key: str = "loss") -> list[float]:
    """One value a step, after checking that no step is missing or doubled."""
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line[key] for line in lines]


def samples(output: Path, world_size: int) -> dict[int, list[int]]:
    """The ids of the samples of each step's global batch, in order, padding left out; the last reading counts."""
    steps: dict[int, list[int]] = {}
    for rank in range(world_size):
        path = output / "samples" / f"rank-{rank}.jsonl"
        if rank and not path.exists():  # fewer ranks read different rows
            break
        own = {}
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            own[entry["step"]] = [i for i in entry["sample_ids"] if i >= 0]
        for step, ids in own.items():
            steps.setdefault(step, []).extend(ids)
    return steps


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def titan_train(*arguments: object, setup: Callable[[], object] = lambda: None) -> Finished:
    """Runs `titan-train` with these arguments in a forked process, which has imported everything already.

    `setup` is called in that process first.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            _become(out.fileno(), err.fileno(), setup, list(map(str, arguments)))
        _, status = os.waitpid(pid, 0)
        out.seek(0)
        err.seek(0)
        return Finished(os.waitstatus_to_exitcode(status), out.read().decode(), err.read().decode())


def _become(out: int, err: int, setup: Callable[[], object], arguments: list[str]) -> None:
    code: object = 1
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    try:
        setup()
        cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
