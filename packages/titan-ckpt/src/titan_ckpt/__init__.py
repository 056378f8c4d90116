"""Distributed checkpoints that are whole and verified, or do not exist."""

__version__ = "0.1.0"
