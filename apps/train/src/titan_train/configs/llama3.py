"""Llama 3 runs: a debug model for any machine, and Meta's sizes.

The debug model:  titan-train
The 8B model:     torchrun --nproc-per-node 8 -m titan_train --config llama3_8b --data.source DIR --data.tokenizer DIR
"""

from titan_core.config import OptimizerConfig, ScheduleConfig
from titan_models.families.llama3 import PRESETS
from titan_quant.config import MixedPrecision
from titan_train.config import CheckpointSection, TrainConfig, TrainingConfig


def llama3_debug() -> TrainConfig:
    """A model small enough to learn Python's standard library on two CPU cores in two minutes."""
    return TrainConfig(
        model=PRESETS["debug"],
        training=TrainingConfig(seq_len=256, global_batch_size=8, steps=200),
        optimizer=OptimizerConfig(lr=1e-3),
        schedule=ScheduleConfig(warmup_steps=20, min_factor=0.1),
        checkpoint=CheckpointSection(every=100),
    )


def llama3_1b() -> TrainConfig:
    """Llama 3.2 1B."""
    return _full_size("1b", lr=3e-4, global_batch_size=512)


def llama3_3b() -> TrainConfig:
    """Llama 3.2 3B."""
    return _full_size("3b", lr=3e-4, global_batch_size=512)


def llama3_8b() -> TrainConfig:
    """Llama 3.1 8B."""
    return _full_size("8b", lr=3e-4, global_batch_size=512)


def llama3_70b() -> TrainConfig:
    """Llama 3.1 70B."""
    return _full_size("70b", lr=1.5e-4, global_batch_size=1024)


def llama3_405b() -> TrainConfig:
    """Llama 3.1 405B."""
    return _full_size("405b", lr=8e-5, global_batch_size=2048)


def _full_size(preset: str, *, lr: float, global_batch_size: int) -> TrainConfig:
    return TrainConfig(
        model=PRESETS[preset],
        training=TrainingConfig(seq_len=8192, global_batch_size=global_batch_size, micro_batch_size=1, steps=100_000),
        optimizer=OptimizerConfig(lr=lr),
        schedule=ScheduleConfig(warmup_steps=2000),
        precision=MixedPrecision(param_dtype="bfloat16"),
        checkpoint=CheckpointSection(every=1000),
    )
