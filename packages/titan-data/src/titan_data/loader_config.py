"""How batches are read ahead of the step that needs them: a section of a training config.

Imports nothing but the standard library, so that a command line can show and check it at once.
"""

from dataclasses import dataclass, field

from titan_data.config import HOW


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """None of it changes what is read."""

    prefetch: int = field(default=2, metadata=HOW)
    """Batches that are prepared ahead, by a thread or by the worker processes; 0 prepares each when it is asked for."""

    workers: int = field(default=0, metadata=HOW)
    """Processes that prepare batches; 0: a thread does, which is faster for tokens mapped from disk. Processes pay
    where rows cost computing: text that is tokenized on the fly, datasets of one's own."""

    timeout_seconds: float = field(default=600.0, metadata=HOW)
    """How long a batch may take to read before the loader is taken to hang, which ends the run with an error that says
    where; a slow file system is no hang."""

    pin_memory: bool | None = field(default=None, metadata=HOW)
    """Put batches into page-locked memory, from which a GPU copies without waiting; None: if there is a GPU."""

    def problems(self) -> list[str]:
        """Every value that cannot be used, each as one sentence; empty if there is none."""
        found = []
        if not 0 <= self.workers <= 1024:
            found.append(f"data.loader.workers is {self.workers}; it must lie between 0 and 1,024.")
        if not 0 <= self.prefetch <= 1000:
            found.append(f"data.loader.prefetch is {self.prefetch}; it must lie between 0 and 1,000.")
        elif self.workers > 0 and self.prefetch == 0:
            found.append("data.loader.prefetch is 0, but data.loader.workers only work ahead; raise it, or leave them.")
        if not self.timeout_seconds > 0:
            found.append(f"data.loader.timeout_seconds is {self.timeout_seconds}; it must be above 0.")
        return found
