"""Low-precision training recipes that refuse what the hardware cannot do."""

__version__ = "0.1.0"
