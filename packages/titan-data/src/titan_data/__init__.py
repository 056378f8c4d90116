"""Text to packed global batches in an exact order, on any number of ranks."""

__version__ = "0.1.0"
