"""Trains a model: wires titan's packages together."""

__version__ = "0.1.0"
