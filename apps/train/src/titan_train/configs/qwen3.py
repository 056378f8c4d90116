"""Qwen3 runs, dense and with experts: two debug models for any machine, and the published sizes.

The debug model with experts:  titan-train --module qwen3 --config qwen3_debug_moe
"""

from titan_models.families.qwen3 import PRESETS
from titan_train.config import TrainConfig
from titan_train.recipes import debug_run, full_size_run


def qwen3_debug() -> TrainConfig:
    """A dense model small enough to learn Python's standard library on two CPU cores in two minutes."""
    return debug_run(PRESETS["debug"])


def qwen3_debug_moe() -> TrainConfig:
    """The same with eight experts, of which each token passes two."""
    return debug_run(PRESETS["debug-moe"])


def qwen3_0_6b() -> TrainConfig:
    """Qwen3 0.6B."""
    return full_size_run(PRESETS["0.6b"], lr=3e-4, global_batch_size=512)


def qwen3_1_7b() -> TrainConfig:
    """Qwen3 1.7B."""
    return full_size_run(PRESETS["1.7b"], lr=3e-4, global_batch_size=512)


def qwen3_4b() -> TrainConfig:
    """Qwen3 4B."""
    return full_size_run(PRESETS["4b"], lr=3e-4, global_batch_size=512)


def qwen3_8b() -> TrainConfig:
    """Qwen3 8B."""
    return full_size_run(PRESETS["8b"], lr=3e-4, global_batch_size=512)


def qwen3_14b() -> TrainConfig:
    """Qwen3 14B."""
    return full_size_run(PRESETS["14b"], lr=2e-4, global_batch_size=1024)


def qwen3_32b() -> TrainConfig:
    """Qwen3 32B."""
    return full_size_run(PRESETS["32b"], lr=1.5e-4, global_batch_size=1024)


def qwen3_30b_a3b() -> TrainConfig:
    """Qwen3 30B with 3B active."""
    return full_size_run(PRESETS["30b-a3b"], lr=3e-4, global_batch_size=1024)


def qwen3_235b_a22b() -> TrainConfig:
    """Qwen3 235B with 22B active."""
    return full_size_run(PRESETS["235b-a22b"], lr=1.5e-4, global_batch_size=2048)
