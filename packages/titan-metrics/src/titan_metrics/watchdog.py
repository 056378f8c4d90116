"""A thread that notices when no step ends, writes down where everything stands, and can end the process.

Each rank's watchdog says in a small file that it is alive, so that survivors can name a rank that is not: one that was
killed or stopped, or whose machine is gone. (The files lie in the run directory, which all ranks must see.) When no
step has ended for `stall_seconds`, it writes into `dumps`

    stacks-rank-N-step-S.txt        the Python stacks of all threads
    collectives-rank-N-step-S.json  the collectives it has called (`titan_metrics.collectives`)

and when `exit_seconds` have passed, it says what it knows on standard error and in `hang-rank-N-step-S.txt`, and ends
the process with `exit_code`; the launcher then ends the others. If the interpreter itself is stuck, so that no Python
thread runs, a timer in C writes the stacks and ends the process with code 1 a little later.

On SIGUSR2 the process writes its stacks into `dumps/stacks-rank-N.txt`, at any time. Signal the workers: a launcher
has no such handler and would end.
"""

import contextlib
import faulthandler
import logging
import math
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Self

from titan_metrics.collectives import find_stuck, read_records, write_record
from titan_metrics.config import WatchdogConfig
from titan_metrics.heartbeats import find_dead, read_heartbeats, remove_heartbeat, write_heartbeat

_log = logging.getLogger(__name__)

_MISSED = 3  # heartbeats, before a rank counts as dead
_GRACE_SECONDS = 2.0  # by which the timer in C gives way to the thread
_REPORT_SECONDS = 30.0  # that a report may take, on a file system which may be what hangs


class Watchdog:
    """Watches the steps of this process from the end of the first one to `close`.

    Folders that cannot be written to cost one warning; stacks that a signal asks for then go to standard error.

    Args:
        run_directory: has `dumps` and `heartbeats`; all ranks must see it.
        config: what to do when.
        rank: of this process.
        world_size: how many processes train together.
        phases: names of what the process is doing, for the report: `Spans.open`.
        before_exit: called before the process is ended, for example to flush spans.
    """

    def __init__(
        self,
        run_directory: Path,
        config: WatchdogConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        phases: Callable[[], Sequence[str]] = tuple,
        before_exit: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._rank, self._world_size = config, rank, world_size
        self._phases, self._before_exit = phases, before_exit
        self._dumps, self._beats = run_directory / "dumps", run_directory / "heartbeats"
        self._stacks_file = self._dumps / f"stacks-rank-{rank}.txt"
        self._step = 0
        self._last: float | None = None  # when a step ended, or something else that counts
        self._dumped = self._warned = False
        self._stacks: IO[str] = sys.__stderr__ or sys.stderr
        self._attempt(lambda: self._beats.mkdir(parents=True, exist_ok=True))
        self._attempt(self._open_stacks)
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self._closed = threading.Event()
        # What is off never comes.
        self._stall, self._end = (seconds or math.inf for seconds in (config.stall_seconds, config.exit_seconds))
        self._every = min(config.heartbeat_seconds, self._stall / 4, self._end / 4)
        self._attempt(lambda: write_heartbeat(self._beats, self._rank, self._step))
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def end_step(self, step: int) -> None:
        """Says that step `step` has ended; the time starts anew."""
        self._step = step
        self.progress()

    def progress(self) -> None:
        """Starts the time anew without a step: in a long validation, or after a checkpoint."""
        self._last = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it nothing is too long; after it, time counts anew if it did before."""
        watched, self._last = self._last is not None, None
        try:
            yield
        finally:
            if watched:
                self.progress()

    def close(self) -> None:
        """Stops watching, and takes the heartbeat away: a rank that has ended is not missed."""
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)
        if self._stacks is not sys.__stderr__:
            self._stacks.close()
        self._attempt(self._tidy_up)

    def _watch(self) -> None:
        while not self._closed.wait(self._every):
            self._attempt(lambda: write_heartbeat(self._beats, self._rank, self._step))
            self._look()

    def _open_stacks(self) -> None:
        self._dumps.mkdir(parents=True, exist_ok=True)
        self._stacks = self._stacks_file.open("a")

    def _tidy_up(self) -> None:
        if self._stacks_file.exists() and self._stacks_file.stat().st_size == 0:
            self._stacks_file.unlink()
        remove_heartbeat(self._beats, self._rank)

    def _attempt(self, write: Callable[[], None]) -> None:
        """Writes if it can: a full disk must not end the watch."""
        try:
            write()
        except OSError as error:
            if not self._warned:
                _log.warning("The watchdog of rank %d could not write: %s", self._rank, error)
            self._warned = True

    def _look(self) -> None:
        last = self._last
        if last is None:
            faulthandler.cancel_dump_traceback_later()
            return
        idle = time.monotonic() - last
        if self._end < math.inf:
            self._end_without_python(max(self._end - idle, 0.0) + 4 * self._every + _GRACE_SECONDS)
        if not self._dumped and idle >= min(self._stall, self._end):
            self._dumped = True
            self._dump(idle)
        elif self._dumped and idle < self._every:
            self._dumped = False
            _log.warning("Rank %d goes on after step %d.", self._rank, self._step)
        if idle >= self._end:
            self._end_process(idle)

    def _end_without_python(self, seconds: float) -> None:
        """Ends the process after so long unless it is called again, by a timer that needs no interpreter."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._stacks)

    def _dump(self, idle: float) -> None:
        self._attempt(self._write_dumps)
        _log.warning(
            "Rank %d: no step has ended for %.0f s after step %d (in %s); stacks and collectives are in %s.",
            self._rank,
            idle,
            self._step,
            " > ".join(self._phases()) or "no span",
            self._dumps,
        )

    def _write_dumps(self) -> None:
        name = f"rank-{self._rank}-step-{self._step}"
        with (self._dumps / f"stacks-{name}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        write_record(self._dumps / f"collectives-{name}.json", self._rank)

    def _end_process(self, idle: float) -> None:
        self._end_without_python(_REPORT_SECONDS)
        with contextlib.suppress(Exception):  # whatever is broken, the process must end
            text = self._report(idle)
            sys.stderr.write(text)
            sys.stderr.flush()
            (self._dumps / f"hang-rank-{self._rank}-step-{self._step}.txt").write_text(text)
        with contextlib.suppress(Exception):
            self._before_exit()
        os._exit(self._config.exit_code)

    def _report(self, idle: float) -> str:
        lines = [
            f"Rank {self._rank} (process {os.getpid()} on {socket.gethostname()}) ends itself with code "
            f"{self._config.exit_code}: no step has ended for {idle:.1f} s after step {self._step}, more than "
            f"watchdog.exit_seconds {self._config.exit_seconds:g}. It is in {' > '.join(self._phases()) or 'no span'}."
        ]
        now = time.time()
        beats = {rank: beat for rank, beat in read_heartbeats(self._beats).items() if rank < self._world_size}
        dead = find_dead(beats, now, max(_MISSED * self._every, 1.0))
        lines += [
            f"Missing: rank {beat.rank} (process {beat.process} on {beat.host}) has given no sign of life for "
            f"{now - beat.time:.1f} s; it had ended step {beat.step} then."
            for beat in dead
        ]
        lines += [
            f"Behind: rank {beat.rank} is alive after step {beat.step}."
            for beat in beats.values()
            if beat not in dead and beat.step < self._step
        ]
        if unseen := sorted(set(range(self._world_size)) - beats.keys()):
            lines.append(f"Not seen in {self._beats}: ranks {', '.join(map(str, unseen))}.")
        alive = beats.keys() - {beat.rank for beat in dead}
        try:
            stuck = find_stuck(read_records(self._dumps, since=now - idle), alive)
        except (OSError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            lines.append(f"What was recorded of collectives cannot be read: {type(error).__name__}: {error}.")
        else:
            lines += [f"Collective: {found}." for found in stuck]
        lines.append(f"Stacks and collectives of the ranks that could still write are in {self._dumps}.")
        return "\n".join(lines) + "\n"
