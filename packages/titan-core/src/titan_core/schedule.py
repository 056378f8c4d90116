"""Warm-up, stable, decay (arXiv 2404.06395, sec. 4.1): the learning rate's factor as a function of the step."""

import math

from titan_core.config import ScheduleConfig


def lr_factor(config: ScheduleConfig, step: int) -> float:
    """Factor on the peak learning rate at `step`, counted from 1, for a schedule whose `total_steps` is set.

    Rises linearly to 1 over the warm-up, stays, and falls from 1 to `min_factor` over the last
    `decay_ratio * total_steps` steps; the last step has exactly `min_factor`, and steps beyond it keep it. Where
    warm-up and decay overlap, the smaller factor counts.
    """
    total = config.total_steps
    if total is None:
        raise ValueError("schedule.total_steps is not set; resolve the configuration first.")
    rise = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    decay_steps = round(config.decay_ratio * total)
    if decay_steps == 0 or step <= total - decay_steps:
        return rise
    left = max(0.0, (total - step) / decay_steps)
    shape = {
        "linear": left,
        "sqrt": 1 - math.sqrt(1 - left),  # arXiv 2405.18392, eq. 5
        "cosine": 0.5 * (1 - math.cos(math.pi * left)),
    }[config.decay]
    return min(rise, config.min_factor + (1 - config.min_factor) * shape)
