"""Where metrics go: one `log` call that reaches every sink and that no broken sink can turn into a lost run.

A sink is anything with `log(step, values)` and `close()`. `build_sinks` makes those that a `MetricsConfig` asks for;
of a distributed run only one rank should do so. The files it makes in the run directory are `metrics.jsonl`,
`metrics.redone.jsonl` (lines of steps that a resumed run did again), `tensorboard/` and `wandb/`.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Protocol, Self

from titan_metrics.config import MetricsConfig
from titan_metrics.console import ConsoleSink
from titan_metrics.jsonl import JsonlSink, resume_jsonl
from titan_metrics.trackers import MissingExtraError, TensorBoardSink, WandbSink

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Somewhere that metrics go; it may raise anything at any time."""

    def log(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Takes the values measured at `step`."""

    def close(self) -> None:
        """Writes what is left and frees what the sink holds."""


class Sinks:
    """Fans metrics out to named sinks; one that fails is switched off with one warning and the run goes on.

    `tracker_ids` are the ids by which a resumed run continues in an outside tracker, by sink name; a checkpoint
    should hold them.
    """

    def __init__(self, sinks: Mapping[str, Sink], tracker_ids: Mapping[str, str] | None = None) -> None:
        self._sinks = dict(sinks)
        self.tracker_ids = dict(tracker_ids or {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Gives the values of `step` to every sink that still works.

        Raises:
            TypeError: if a value is not a plain number or string, a tensor for example; the caller decides when
                to wait for a device, not a sink.
            ValueError: if a value is named `step` or `time`.
        """
        _check(values)
        for name, sink in tuple(self._sinks.items()):
            try:
                sink.log(step, values)
            except Exception as error:  # whatever a sink raises is less than the run
                self._switch_off(name, error)

    def close(self) -> None:
        """Closes every sink that still works; a second call does nothing."""
        for name, sink in tuple(self._sinks.items()):
            try:
                sink.close()
            except Exception as error:  # as above; also, the sinks after it must still be closed
                self._switch_off(name, error)
        self._sinks.clear()

    def _switch_off(self, name: str, error: Exception) -> None:
        sink = self._sinks.pop(name)
        _log.warning("The %s metrics are switched off for the rest of this run: %s", name, _describe(error))
        with suppress(Exception):
            sink.close()


def build_sinks(
    config: MetricsConfig,
    run_directory: Path,
    total_steps: int,
    resume_step: int | None = None,
    *,
    tracker_ids: Mapping[str, str] | None = None,
    run_config: Mapping[str, object] | None = None,
) -> Sinks:
    """Opens the sinks that `config` asks for, `metrics.jsonl` always among them.

    A sink that cannot be opened costs one warning; one whose library is not installed is an error, which is known to
    come before any work is done.

    Args:
        config: which sinks.
        run_directory: the run's folder; made if missing.
        total_steps: the step at which the run ends.
        resume_step: the step that was restored, None for a new run. Lines of `metrics.jsonl` after it (for a new
            run: all lines) move to `metrics.redone.jsonl`, so that each step is in `metrics.jsonl` once.
        tracker_ids: `Sinks.tracker_ids` of the run that is resumed.
        run_config: the run's resolved configuration, for trackers that show it.

    Raises:
        ValueError: if `config` has problems; all are listed.
        MissingExtraError: if a sink's library is not installed.
    """
    if problems := config.problems():
        raise ValueError("The metrics configuration cannot be used: " + " ".join(problems))
    run_directory.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[], Sink]] = {"jsonl": partial(_open_jsonl, run_directory, resume_step)}
    if config.tensorboard:
        makers["tensorboard"] = partial(TensorBoardSink, run_directory / "tensorboard", resume_step)
    if config.wandb:
        makers["wandb"] = partial(
            WandbSink,
            run_directory,
            project=config.wandb_project,
            mode=config.wandb_mode,
            name=run_directory.resolve().name,
            run_id=(tracker_ids or {}).get("wandb"),
            run_config=run_config,
        )
    if config.console:  # last, so that nothing is printed into its bar
        makers["console"] = partial(ConsoleSink, total_steps, first_step=resume_step or 0)

    opened: dict[str, Sink] = {}
    with ExitStack() as undo:
        for name, make in makers.items():
            try:
                opened[name] = make()
            except Exception as error:
                if isinstance(error, MissingExtraError):
                    raise
                _log.warning("The run goes on without %s metrics: %s", name, _describe(error))
            else:
                undo.callback(opened[name].close)
        undo.pop_all()
    ids = dict(tracker_ids or {})
    if isinstance(wandb_sink := opened.get("wandb"), WandbSink) and wandb_sink.run_id is not None:
        ids["wandb"] = wandb_sink.run_id
    return Sinks(opened, ids)


def _open_jsonl(run_directory: Path, resume_step: int | None) -> JsonlSink:
    path = run_directory / "metrics.jsonl"
    resume_jsonl(path, -1 if resume_step is None else resume_step)
    return JsonlSink(path, clock=time.time)


def _check(values: Mapping[str, float | int | str]) -> None:
    for key, value in values.items():
        if not isinstance(value, (float, int, str)):
            raise TypeError(
                f"The metric {key!r} is a {type(value).__name__}; log a plain number or string (of a tensor or a "
                "NumPy scalar: its `.item()`)."
            )
    for name in ("step", "time"):
        if name in values:
            raise ValueError(f"A metric cannot be named {name!r}: each line has one already, that of `log`.")


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
