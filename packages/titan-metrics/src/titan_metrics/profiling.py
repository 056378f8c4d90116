"""Profiles and photographs of memory at chosen steps of a run, written to its `dumps`.

profile-rank-N-step-S.json.gz    operators and kernels of the steps that end with S, for https://ui.perfetto.dev
memory-rank-N-step-S.pickle      a GPU's memory with the stacks that allocated it, for
                                 https://docs.pytorch.org/memory_viz
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from titan_metrics.config import ProfilingConfig

if TYPE_CHECKING:
    from torch.profiler import profile

_log = logging.getLogger(__name__)


class NoAllocatorError(RuntimeError):
    """Memory was to be photographed where no allocator records it."""


class Profiler:
    """Runs torch.profiler for some steps of a rank, as the configuration says.

    Call `begin_step` and `end_step` around every step; outside a profile each costs a comparison or two. A profile that
    the end of the run cuts short is written with the steps it has; one that was never begun is told of.
    """

    def __init__(self, run_directory: Path, config: ProfilingConfig, rank: int = 0) -> None:
        self._dumps = run_directory / "dumps"
        self._config, self._rank = config, rank
        self._chosen = config.profile_at > 0 and (not config.profile_ranks or rank in config.profile_ranks)
        self._running: profile | None = None
        self._begun = False
        self._last = 0
        self._step = 0

    def begin_step(self, step: int) -> None:
        """Starts a profile if one is due at `step`."""
        self._step = step
        if not self._chosen or self._running is not None or not self._is_due(step):
            return
        from torch.profiler import profile  # half a second

        self._running = profile(
            record_shapes=True, profile_memory=False, with_stack=self._config.profile_stacks, acc_events=True
        )
        self._begun = True
        self._last = step + self._config.profile_steps - 1
        self._running.start()

    def end_step(self, step: int) -> None:
        """Ends the profile if this is its last step, and writes it; a failure to write is a warning."""
        if self._running is not None and step >= self._last:
            self._write(self._running, step)

    def close(self) -> None:
        """Ends and writes a profile that the run has left unfinished; warns if none was begun at all."""
        if self._running is not None:
            self._write(self._running, self._step)
        elif self._chosen and not self._begun:
            _log.warning(
                "Rank %d has made no profile: profiling.profile_at is step %d, and the last step of this start was %d.",
                self._rank,
                self._config.profile_at,
                self._step,
            )

    def _write(self, running: "profile", step: int) -> None:
        self._running = None
        running.stop()
        path = self._dumps / f"profile-rank-{self._rank}-step-{step}.json.gz"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            _log.warning("The profile of rank %d was not written: %s", self._rank, error)

    def _is_due(self, step: int) -> bool:
        since, every = step - self._config.profile_at, self._config.profile_every
        return since == 0 or (every > 0 and since > 0 and since % every == 0)


class MemorySnapshots:
    """Photographs a GPU's memory after a chosen step, and when it runs out.

    Raises:
        NoAllocatorError: if there is no GPU.
    """

    def __init__(self, run_directory: Path, config: ProfilingConfig, rank: int = 0) -> None:
        import torch

        from titan_metrics.compat import on_out_of_memory, record_memory

        if not torch.cuda.is_available():
            raise NoAllocatorError(
                "profiling.snapshot_at and profiling.snapshot_on_oom photograph the memory of a GPU, and PyTorch sees "
                "none here. Leave them out; the memory of a process on a CPU is in the metrics as memory.used."
            )
        self._dumps, self._config, self._rank = run_directory / "dumps", config, rank
        self._step = 0
        record_memory(config.snapshot_entries)
        if config.snapshot_on_oom:
            on_out_of_memory(self._write)

    def end_step(self, step: int) -> None:
        """Photographs the memory if it is due after `step`."""
        self._step = step
        if step == self._config.snapshot_at:
            self._write()

    def close(self) -> None:
        """Stops recording; warns if the step to photograph never came."""
        from titan_metrics.compat import stop_recording_memory

        if self._step < self._config.snapshot_at:
            _log.warning(
                "Rank %d has no photograph of its memory: profiling.snapshot_at is step %d, and the last step was %d.",
                self._rank,
                self._config.snapshot_at,
                self._step,
            )
        stop_recording_memory()

    def _write(self) -> None:
        from titan_metrics.compat import dump_memory

        path = self._dumps / f"memory-rank-{self._rank}-step-{self._step}.pickle"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            dump_memory(path)
        except (OSError, RuntimeError) as error:
            _log.warning("The memory of rank %d was not photographed: %s", self._rank, error)
        else:
            _log.warning("The memory of rank %d is photographed in %s.", self._rank, path)
