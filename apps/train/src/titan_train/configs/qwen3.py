"""Qwen3 runs, dense and with experts: two debug models for any machine, and the published sizes.

The debug model with experts:  titan-train --module qwen3 --config qwen3_debug_moe
"""

from titan_core.config import OptimizerConfig, ScheduleConfig
from titan_models.families.qwen3 import PRESETS
from titan_quant.config import MixedPrecision
from titan_train.config import CheckpointSection, TrainConfig, TrainingConfig


def qwen3_debug() -> TrainConfig:
    """A dense model small enough to learn Python's standard library on two CPU cores in two minutes."""
    return _debug("debug")


def qwen3_debug_moe() -> TrainConfig:
    """The same with eight experts, of which each token passes two."""
    return _debug("debug-moe")


def qwen3_0_6b() -> TrainConfig:
    """Qwen3 0.6B."""
    return _full_size("0.6b", lr=3e-4, global_batch_size=512)


def qwen3_1_7b() -> TrainConfig:
    """Qwen3 1.7B."""
    return _full_size("1.7b", lr=3e-4, global_batch_size=512)


def qwen3_4b() -> TrainConfig:
    """Qwen3 4B."""
    return _full_size("4b", lr=3e-4, global_batch_size=512)


def qwen3_8b() -> TrainConfig:
    """Qwen3 8B."""
    return _full_size("8b", lr=3e-4, global_batch_size=512)


def qwen3_14b() -> TrainConfig:
    """Qwen3 14B."""
    return _full_size("14b", lr=2e-4, global_batch_size=1024)


def qwen3_32b() -> TrainConfig:
    """Qwen3 32B."""
    return _full_size("32b", lr=1.5e-4, global_batch_size=1024)


def qwen3_30b_a3b() -> TrainConfig:
    """Qwen3 30B with 3B active."""
    return _full_size("30b-a3b", lr=3e-4, global_batch_size=1024)


def qwen3_235b_a22b() -> TrainConfig:
    """Qwen3 235B with 22B active."""
    return _full_size("235b-a22b", lr=1.5e-4, global_batch_size=2048)


def _debug(preset: str) -> TrainConfig:
    return TrainConfig(
        model=PRESETS[preset],
        training=TrainingConfig(seq_len=256, global_batch_size=8, steps=200),
        optimizer=OptimizerConfig(lr=1e-3),
        schedule=ScheduleConfig(warmup_steps=20, min_factor=0.1),
        checkpoint=CheckpointSection(every=100),
    )


def _full_size(preset: str, *, lr: float, global_batch_size: int) -> TrainConfig:
    return TrainConfig(
        model=PRESETS[preset],
        training=TrainingConfig(seq_len=8192, global_batch_size=global_batch_size, micro_batch_size=1, steps=100_000),
        optimizer=OptimizerConfig(lr=lr),
        schedule=ScheduleConfig(warmup_steps=2000),
        precision=MixedPrecision(param_dtype="bfloat16"),
        checkpoint=CheckpointSection(every=1000),
    )
