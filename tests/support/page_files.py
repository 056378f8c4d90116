"""What the pages take for granted: some text, conversations, weights, and a machine on which they are quick.

Pages speak of the debug models and of Python's standard library. Here these are much smaller, so that what a page takes
minutes for is done in seconds by the same code.
"""

import dataclasses
import functools
import gzip
import json
import random
import shutil
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import command_runs
import commands
from titan_models.config import DecoderConfig
from titan_train import recipes, trainer
from titan_train.config import TrainConfig
from titan_train.configs import llama3, qwen3

STEPS, MOST_STEPS = 6, 40
"""Of a debug run that a page gives no number of, and of one that it gives a larger number of."""


def make_small(library: Path) -> Callable[[], None]:
    """What makes a forked process small: its debug models, its standard library and the length of its debug runs."""

    def small(model: DecoderConfig) -> DecoderConfig:
        moe = model.moe and dataclasses.replace(model.moe, hidden_dim=32)
        return dataclasses.replace(model, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden_dim=64, moe=moe)

    def debug_run(model: DecoderConfig) -> TrainConfig:
        run = recipes.debug_run(small(model))
        return dataclasses.replace(run, training=dataclasses.replace(run.training, seq_len=64, steps=STEPS))

    def setup() -> None:
        path_of = sysconfig.get_path
        sysconfig.get_path = lambda name, *args, **kwargs: (
            str(library) if name == "stdlib" else path_of(name, *args, **kwargs)
        )
        for module in (llama3, qwen3):
            module.debug_run = debug_run
        trainer.train = functools.partial(_shortened, trainer.train)
        # Directories that are named after the second would be those of runs of the same second.
        trainer.default_directory = lambda name: Path("runs") / f"{name}-{time.time_ns()}"

    return setup


def _shortened(train: Callable[..., object], config: TrainConfig, *args: object, **kwargs: object) -> object:
    training = dataclasses.replace(config.training, steps=min(config.training.steps, MOST_STEPS))
    return train(dataclasses.replace(config, training=training), *args, **kwargs)


def write_library(folder: Path) -> None:
    """A part of the standard library."""
    source = Path(sysconfig.get_path("stdlib"))
    for name in ("json", "email", "html"):
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "test*"))


def write_files(folder: Path, setup: Callable[[], object]) -> None:
    """The files that pages mention and do not show."""
    words = random.Random(0)

    def text() -> str:
        return " ".join(words.choices(["snow", "wood", "a", "dark", "horse", "lake", "miles", "sleep"], k=200))

    for name in ("my_texts", "books"):
        (folder / name).mkdir()
        for i in range(6):
            (folder / name / f"{i}.txt").write_text(text())
    for name in ("held_out.jsonl", "code.jsonl"):
        (folder / name).write_text("".join(json.dumps({"text": text()}) + "\n" for _ in range(6)))
    (folder / "logs").mkdir()
    for i in range(2):
        lines = "".join(json.dumps({"text": text()}) + "\n" for _ in range(20))
        (folder / "logs" / f"{i}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    sums = [(f"What is {i} and {i}?", str(2 * i)) for i in range(20)]
    chats = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in sums]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    for name in ("scripts", "benchmarks"):  # commands of the repository's root
        (folder / name).symlink_to(commands.ROOT / name)
    (folder / "questions.txt").write_text("What is a haiku?\nWhat is snow?\n")
    _write_qwen3(folder, setup)


def _write_qwen3(folder: Path, setup: Callable[[], object]) -> None:
    """A small model with a tokenizer that has a template: as the hub has it, and as a checkpoint."""
    run = "--module qwen3 --config qwen3_debug --data.kind sft --data.source conversations --data.sft.template chatml "
    run += "--data.vocab-size 600 --training.steps 1 --export.format huggingface --output made --metrics.no-console"
    command_runs.run(commands.parse(f"titan-train {run}"), folder, setup)
    exported = folder / "made" / "hugging_face" / "step-1"
    shutil.copytree(exported, folder / "Qwen3-0.6B")
    shutil.copytree(folder / "made" / "checkpoints" / "step-1", folder / "qwen3")
    shutil.copyfile(exported / "tokenizer.json", folder / "tokenizer.json")
    shutil.rmtree(folder / "made")
