"""The command `titan-convert`: checkpoints from one format into another."""

__version__ = "0.1.0"
