"""Llama 3 runs: a debug model for any machine, and Meta's sizes.

The debug model:  titan-train
Conversations:    titan-train --config llama3_sft
The 8B model:     torchrun --nproc-per-node 8 -m titan_train --config llama3_8b --data.source DIR --data.tokenizer DIR
"""

import dataclasses

from titan_data.sft_config import SFTConfig
from titan_models.families.llama3 import PRESETS
from titan_train.config import DataSection, TrainConfig
from titan_train.recipes import debug_run, full_size_run


def llama3_debug() -> TrainConfig:
    """A model small enough to learn Python's standard library on two CPU cores in two minutes."""
    return debug_run(PRESETS["debug"])


def llama3_sft() -> TrainConfig:
    """The debug model, on a small set of conversations that comes along, with loss on the assistant's words."""
    data = DataSection(kind="sft", source="conversations", vocab_size=600, sft=SFTConfig(template="llama3"))
    run = debug_run(dataclasses.replace(PRESETS["debug"], vocab_size=600))
    return dataclasses.replace(run, data=data)


def llama3_1b() -> TrainConfig:
    """Llama 3.2 1B."""
    return full_size_run(PRESETS["1b"], lr=3e-4, global_batch_size=512)


def llama3_3b() -> TrainConfig:
    """Llama 3.2 3B."""
    return full_size_run(PRESETS["3b"], lr=3e-4, global_batch_size=512)


def llama3_8b() -> TrainConfig:
    """Llama 3.1 8B."""
    return full_size_run(PRESETS["8b"], lr=3e-4, global_batch_size=512)


def llama3_70b() -> TrainConfig:
    """Llama 3.1 70B."""
    return full_size_run(PRESETS["70b"], lr=1.5e-4, global_batch_size=1024)


def llama3_405b() -> TrainConfig:
    """Llama 3.1 405B."""
    return full_size_run(PRESETS["405b"], lr=8e-5, global_batch_size=2048)
