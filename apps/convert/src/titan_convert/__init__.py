"""Converts checkpoints between formats."""

__version__ = "0.1.0"
