"""Runs that the configurations of several families share: a small one for any machine, and one of a published size."""

from titan_core.config import OptimizerConfig, ScheduleConfig
from titan_models.config import DecoderConfig
from titan_quant.config import MixedPrecision
from titan_train.config import CheckpointSection, TrainConfig, TrainingConfig


def debug_run(model: DecoderConfig) -> TrainConfig:
    """For a model small enough to learn Python's standard library on two CPU cores in two minutes."""
    return TrainConfig(
        model=model,
        training=TrainingConfig(seq_len=256, global_batch_size=8, steps=200),
        optimizer=OptimizerConfig(lr=1e-3),
        schedule=ScheduleConfig(warmup_steps=20, min_factor=0.1),
        checkpoint=CheckpointSection(every=100),
    )


def full_size_run(model: DecoderConfig, *, lr: float, global_batch_size: int) -> TrainConfig:
    """For a model of a published size, in bfloat16; degrees and data are the user's to give."""
    return TrainConfig(
        model=model,
        training=TrainingConfig(seq_len=8192, global_batch_size=global_batch_size, micro_batch_size=1, steps=100_000),
        optimizer=OptimizerConfig(lr=lr),
        schedule=ScheduleConfig(warmup_steps=2000),
        precision=MixedPrecision(param_dtype="bfloat16"),
        checkpoint=CheckpointSection(every=1000),
    )
