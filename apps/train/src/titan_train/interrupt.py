"""Signals that ask a run to save and end: SIGTERM and SIGUSR1, by which clusters take machines back, and Ctrl-C."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Self

from titan_train.votes import Votes

_PR_SET_PDEATHSIG = 1
_PREEMPTING = (signal.SIGTERM, signal.SIGUSR1)


def end_with_launcher() -> None:
    """Lets the system kill this process when the one that started it, torchrun, is no more.

    Otherwise its ranks would train on unseen, in the way of those that torchrun's other agents start instead. Only
    Linux can do so.
    """
    if sys.platform == "linux":
        launcher = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it ended before we asked
            os.kill(os.getpid(), signal.SIGKILL)


class Preempted(KeyboardInterrupt):
    """A run that has nothing to save yet was told to end."""


class Interrupt:
    """While open, SIGTERM and SIGUSR1 don't end the process; `received` says whether, and which, one has come.

    A signal is only noted: an error raised in the middle of whatever runs, an import for instance, would come out as
    anything. A process that is `alone` ends at the next `check`; ranks end together, when they next agree.
    """

    def __init__(self, *, alone: bool) -> None:
        self.received: signal.Signals | None = None
        self._alone = alone
        self._deferring = False
        self._before: dict[int, signal._HANDLER] = {}

    @property
    def vote(self) -> Votes:
        """What this rank has to say when ranks agree."""
        return Votes(by_hand=int(self.received == signal.SIGINT), preempted=int(self.received in _PREEMPTING))

    def check(self) -> None:
        """Called between the parts of a start: ends it if this process is alone.

        Raises:
            Preempted: if a signal has come.
        """
        if self._alone and self.received is not None:
            raise Preempted

    def __enter__(self) -> Self:
        for number in _PREEMPTING:
            self._install(number)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a first Ctrl-C is only noted too; a second ends the process at once."""
        self._install(signal.SIGINT)
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
            signal.signal(signal.SIGINT, self._before.pop(signal.SIGINT))

    def _install(self, number: int) -> None:
        self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, self.received or signal.Signals(number)
        # The default action ends the process even while it waits inside a collective, where Python cannot.
        if self._deferring:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if first:
            says = (
                "after this step and saving; press Ctrl-C again to exit at once"
                if self._deferring
                else "before training"
            )
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\nStopping {says}.\n".encode())
