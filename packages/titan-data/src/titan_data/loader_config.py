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

    pin_memory: bool = field(default=False, metadata=HOW)
    """Put batches into page-locked memory, from which a GPU copies without waiting; takes a GPU."""
