"""Metrics for the two experiment trackers that most people already have open: TensorBoard and Weights & Biases.

Both are optional and heavy to import, so each is imported when its sink is made.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

_JOIN_SECONDS = 1.0  # that TensorBoard's thread gets to end once it has failed


class MissingExtraError(RuntimeError):
    """A sink was asked for whose library is not installed."""

    def __init__(self, sink: str, extra: str) -> None:
        super().__init__(
            f"{sink} metrics were asked for, but the library that writes them is not installed. Run "
            f"`pip install './packages/titan-metrics[{extra}]'`, or leave {extra} out of the metrics configuration."
        )


class WandbError(RuntimeError):
    """Weights & Biases could not start a run."""


class TensorBoardSink:
    """Writes TensorBoard event files: numbers as scalars, strings as text.

    Args:
        directory: the folder of the event files; made if missing.
        resume_step: the step a run was resumed from; later events that an earlier process wrote are hidden.

    Raises:
        MissingExtraError: if tensorboard is not installed.
    """

    def __init__(self, directory: Path, resume_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("TensorBoard", "tensorboard") from error
        purge_step = None if resume_step is None else resume_step + 1
        before = set(threading.enumerate())
        self._excepthook = threading.excepthook
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)
        self._threads = set(threading.enumerate()) - before
        # Else a thread of TensorBoard's that fails prints its traceback beside the one warning.
        threading.excepthook = self._report

    def log(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Queues the values; a thread of TensorBoard's writes them, and its failure is raised by a later call."""
        for key, value in values.items():
            if isinstance(value, str):
                self._writer.add_text(key, value, step)
            else:
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Writes what is still queued and closes the file."""
        try:
            self._writer.close()
        finally:
            for thread in self._threads:
                thread.join(_JOIN_SECONDS)
            if threading.excepthook == self._report:
                threading.excepthook = self._excepthook

    def _report(self, failure: threading.ExceptHookArgs) -> None:
        if failure.thread not in self._threads:
            self._excepthook(failure)


class WandbSink:
    """Logs to a Weights & Biases run.

    The step is logged as a metric of its own, `step`, which all the others are plotted against. So a resumed run
    may log again the steps that it redoes; W&B's own counter only moves forward and would drop them.

    Args:
        directory: W&B keeps its files in a `wandb` folder below this one.
        project: the W&B project.
        mode: `offline` writes locally and sends nothing; `wandb sync` sends it later. None: as WANDB_MODE in the
            environment says, else `online`.
        name: the run's name on the W&B page.
        run_id: the `run_id` of the run to continue; None starts a new one.
        run_config: what the W&B page shows as the run's configuration.

    Raises:
        MissingExtraError: if wandb is not installed.
        WandbError: if W&B cannot start the run, for example since nobody is logged in.
    """

    def __init__(
        self,
        directory: Path,
        *,
        project: str,
        mode: Literal["online", "offline", "disabled"] | None,
        name: str | None = None,
        run_id: str | None = None,
        run_config: Mapping[str, object] | None = None,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError("Weights & Biases", "wandb") from error
        try:
            self._run = wandb.init(
                project=project,
                dir=str(directory),
                mode=mode,
                name=name,
                id=run_id,
                resume=None if run_id is None else "allow",
                config=dict(run_config or {}),
                settings=wandb.Settings(console="off"),  # captured output would hold every redrawn progress bar
            )
        except wandb.Error as error:
            raise WandbError(
                f"{str(error).rstrip('.')}. To keep the run on disk, use --metrics.wandb-mode offline; `wandb sync` "
                "sends it later."
            ) from error
        self._run.define_metric("*", step_metric="step")

    @property
    def run_id(self) -> str | None:
        """The id that continues this run, to be kept in the checkpoint; None if W&B is disabled."""
        return None if self._run.disabled else self._run.id

    def log(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Hands the values to W&B's background process."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Ends the run; online, this waits until everything was sent."""
        self._run.finish()
