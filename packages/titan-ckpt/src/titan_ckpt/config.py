"""The checkpoint section of a run's config: where a run keeps its state, never what it computes.

Imports no torch, so that help and validation answer at once.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run saves its state, what it keeps, and what it starts from.

    There are two kinds: passing checkpoints, of which only the latest are kept, and permanent ones. Those after the
    last step and when a run is told to stop are passing ones, unless their step is due for a permanent one.
    """

    enabled: bool = True
    """Save checkpoints; without them a run that ends or dies leaves no weights."""

    every: int = 500
    """Steps between passing checkpoints; 0: none by steps. The last step is saved in any case."""

    every_minutes: float = 0.0
    """Minutes from one checkpoint to the next passing one, by rank 0's clock; 0: none by time."""

    keep_latest: int = 2
    """Passing checkpoints to keep; older ones are deleted after a newer one is published. 0 keeps all."""

    permanent_every: int = 0
    """Steps between permanent checkpoints, which are never deleted; 0: none."""

    permanent_steps: tuple[int, ...] = ()
    """Further steps after which a permanent checkpoint is saved."""

    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory of what a rank has; otherwise training waits."""

    resume: Literal["never", "auto", "required"] = "auto"
    """Start from the newest whole checkpoint: `never`, `auto` (if there is one) or `required` (else stop)."""

    verify_hashes: bool = True
    """Read every file and compare its SHA-256 before resuming from it; sizes are compared in any case."""

    init_from: str | None = None
    """Weights only, for a new run: a run directory, a checkpoint, a Hugging Face folder, or a URL of one."""

    exclude: tuple[str, ...] = ()
    """Parts of a checkpoint that are left out when resuming, e.g. optimizer: they start as in a new run."""

    @property
    def saves_on_the_way(self) -> bool:
        """Whether there are checkpoints before the last step."""
        return bool(self.enabled and (self.every or self.every_minutes or self.permanent_every or self.permanent_steps))

    def problems(self) -> list[str]:
        """Every value out of range, each as one sentence with a remedy; empty if there is none."""
        found = [
            f"checkpoint.{name} is {getattr(self, name)}; give 0 for none, or more."
            for name in ("every", "every_minutes", "permanent_every")
            if not getattr(self, name) >= 0
        ]
        if self.keep_latest < 0 or self.keep_latest == 1:
            found.append(
                f"checkpoint.keep_latest is {self.keep_latest}; keep at least 2, since one alone may turn out damaged "
                "when it is needed, or give 0 to keep all."
            )
        if wrong := [step for step in self.permanent_steps if step < 1]:
            found.append(f"checkpoint.permanent_steps has {', '.join(map(str, wrong))}; the first step is 1.")
        if self.resume not in ("never", "auto", "required"):
            found.append(f"checkpoint.resume is {self.resume!r}; choose one of never, auto, required.")
        if self.init_from == "":
            found.append("checkpoint.init_from is empty; name what holds the weights, or leave it out.")
        return found
