"""Generative models as plain single-device modules, with torch-free facts about them."""

__version__ = "0.1.0"
