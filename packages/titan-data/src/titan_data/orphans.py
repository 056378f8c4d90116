"""Ending a process whose parent was killed, instead of leaving it to wait for work for ever.

Nobody tells a process that its parent has died. One that Python's `multiprocessing` started holds the reading end of a
pipe whose writing end only the parent has, so it sees that end close. (The process above it in the system's tree says
nothing: with "forkserver" that is the server, which stays for as long as one of its children does.)
"""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Ends this process, at once and without cleaning up, when the process that started it has ended."""
    threading.Thread(target=_wait, name="titan-data orphan", daemon=True).start()


def _wait() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
