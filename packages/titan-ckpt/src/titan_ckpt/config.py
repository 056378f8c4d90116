"""The checkpoint section of a run's config: where a run keeps its state, never what it computes.

Imports no torch, so that help and validation answer at once.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run saves its state, what it keeps, and whether it starts from what it finds."""

    enabled: bool = True
    """Save checkpoints; without them a run that ends or dies leaves no weights."""

    every: int = 500
    """Steps between saves; 0 saves only after the last step."""

    keep_latest: int = 2
    """Checkpoints to keep; older ones are deleted after a newer one is published. 0 keeps all."""

    resume: Literal["never", "auto", "required"] = "auto"
    """Start from the newest whole checkpoint: `never`, `auto` (if there is one) or `required` (else stop)."""

    verify_hashes: bool = True
    """Read every file and compare its SHA-256 before resuming from it; sizes are compared in any case."""
