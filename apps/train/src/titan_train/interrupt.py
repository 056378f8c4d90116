"""Ctrl-C and SIGTERM: the first asks the run to save and end, a second Ctrl-C ends the process at once."""

import signal
import sys
from types import FrameType
from typing import Self


class Interrupt:
    """While open, a first SIGINT or SIGTERM only sets `requested`; the loop looks at it once a step."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        # The default action ends the process even while it waits inside a collective, where Python cannot.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.stderr.write("\nStopping after this step and saving; press Ctrl-C again to exit at once.\n")
