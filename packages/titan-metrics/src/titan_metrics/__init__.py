"""What a training run does: metrics, MFU, memory, timelines, slow and missing ranks, the first NaN, a report."""

__version__ = "0.1.0"
