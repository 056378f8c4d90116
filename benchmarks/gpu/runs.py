"""What the GPU benchmarks have in common: titan-train --module benchmarks/gpu/runs.py --config llama3_8b.

As in torchtitan's tables: bfloat16, sequences of 8,192 tokens, attention over the whole sequence, a hundred steps of
which the line of step 90 counts, no checkpoints. The text is Python's standard library, so that nothing has to be
fetched: what is in a batch does not change its speed.
"""

import dataclasses

from titan_train.config import CheckpointSection, TrainConfig
from titan_train.configs import llama3, qwen3


def llama3_8b() -> TrainConfig:
    """Llama 3.1 8B."""
    return _timed(llama3.llama3_8b())


def llama3_70b() -> TrainConfig:
    """Llama 3.1 70B."""
    return _timed(llama3.llama3_70b())


def llama3_405b() -> TrainConfig:
    """Llama 3.1 405B."""
    return _timed(llama3.llama3_405b())


def qwen3_30b_a3b() -> TrainConfig:
    """Qwen3 30B with 3B active."""
    return _timed(qwen3.qwen3_30b_a3b())


def _timed(run: TrainConfig) -> TrainConfig:
    return dataclasses.replace(
        run,
        training=dataclasses.replace(run.training, steps=100),
        data=dataclasses.replace(run.data, confine_attention=False),
        schedule=dataclasses.replace(run.schedule, total_steps=10_000),
        checkpoint=CheckpointSection(enabled=False),
        device="cuda",
    )
