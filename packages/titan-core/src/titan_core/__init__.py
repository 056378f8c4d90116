"""PyTorch parallelism from a table of roles, with initial weights, optimizers and schedules to match."""

__version__ = "0.1.0"
