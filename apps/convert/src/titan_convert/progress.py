"""One line on the terminal that says how far a conversion is, how fast, and how long it still takes."""

import math
import sys
import time
from collections.abc import Callable
from typing import TextIO

_INTERVAL_SECONDS = 0.1


def size_text(size: float) -> str:
    """Bytes as a person reads them: `3.2 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


class ProgressLine:
    """Writes the state of each part of the work; over and over on a terminal, else once when it is done."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._live = self._stream.isatty()
        self._open = False
        self._what = ""
        self._started = 0.0
        self._shown = -math.inf

    def __call__(self, what: str, done: int, total: int) -> None:
        """Takes what is being done, the bytes done and the bytes in all."""
        now = self._clock()
        if what != self._what:
            self._what, self._started, self._shown = what, now, -math.inf
        last = done >= total
        if last or (self._live and now - self._shown >= _INTERVAL_SECONDS):
            self._shown = now
            text = _line(what, done, total, now - self._started)
            self._stream.write(f"\r{text:<78}" if self._live else text)
            self._open = True
            if last:
                self.close()
            self._stream.flush()

    def close(self) -> None:
        """Ends the line, so that what comes next starts on its own."""
        if self._open:
            self._stream.write("\n")
            self._open = False


def _line(what: str, done: int, total: int, seconds: float) -> str:
    speed = done / seconds if seconds > 0 else 0.0
    text = f"{what:<9} {size_text(done)} of {size_text(total)}"
    if speed == 0.0:
        return text
    return f"{text}, {size_text(speed)}/s" + (f", {(total - done) / speed:.0f} s left" if done < total else "")
