"""How many threads tokenizing may take, in this process.

The `tokenizers` library keeps threads that do not survive a fork: a child that went on to use them would hang. So it
warns at each fork, unless its environment variable says what to do. That variable is obeyed here for all engines.
"""

import contextlib
import os
from collections.abc import Generator

_THREADS = "TOKENIZERS_PARALLELISM"
_set_by: int | None = None
"""The process in which the variable has this module's value, and not the user's."""


def thread_count() -> int:
    """Returns how many threads to use: one for each core that this process may use, or one if the user says so."""
    if os.environ.get(_THREADS, "true").lower() in ("false", "0", "off", "no") and not _ours():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def library_threads() -> Generator[None]:
    """Lets the `tokenizers` library use all cores within the block, and one after it.

    Where the user has set its variable, it stays as it is.
    """
    global _set_by
    if not _ours() or os.environ.get(_THREADS) == "true":
        yield
        return
    _set_by = os.getpid()
    os.environ[_THREADS] = "true"
    try:
        yield
    finally:
        os.environ[_THREADS] = "false"


def one_thread() -> None:
    """Makes this process, which is one of several that share the cores, tokenize with one thread."""
    global _set_by
    os.environ[_THREADS] = "false"
    _set_by = None


def _ours() -> bool:
    return _THREADS not in os.environ or _set_by == os.getpid()
