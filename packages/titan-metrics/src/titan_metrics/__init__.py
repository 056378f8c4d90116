"""Metrics, throughput, MFU and memory of a training run, to console, JSONL, TensorBoard and W&B."""

__version__ = "0.1.0"
