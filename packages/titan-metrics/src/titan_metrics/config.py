"""What a run records and where it shows it; torch-free, so that a login node can read and check it."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Which sinks get a run's metrics and how often.

    The whole section is about *where* a run is seen: nothing here changes what is computed.
    """

    log_every: int = 10
    """Steps between two logged lines; the first and the last step should be logged as well."""

    console: bool = True
    """Show progress on standard output: a bar with an ETA on a terminal, plain lines elsewhere."""

    tensorboard: bool = False
    """Write event files to the run directory's `tensorboard` folder (needs `titan-metrics[tensorboard]`)."""

    wandb: bool = False
    """Log to Weights & Biases (needs `titan-metrics[wandb]`)."""

    wandb_project: str = "titan"
    """The Weights & Biases project that the run belongs to."""

    wandb_mode: Literal["online", "offline"] = "online"
    """`offline` writes the W&B run below the run directory and sends nothing; `wandb sync` sends it later."""

    peak_tflops: float | None = None
    """The device's dense peak in TFLOP/s, the denominator of MFU. None looks it up by the device's name; an
    unknown device has no MFU."""

    def problems(self) -> list[str]:
        """Every value that cannot be used, each as one sentence with its remedy; empty if there is none."""
        problems = []
        if self.log_every < 1:
            problems.append(f"metrics.log_every is {self.log_every}; it must be at least 1.")
        if self.peak_tflops is not None and not (math.isfinite(self.peak_tflops) and self.peak_tflops > 0):
            problems.append(
                f"metrics.peak_tflops is {self.peak_tflops}; give the peak of one device in TFLOP/s, or leave it out "
                "to have it looked up."
            )
        if self.wandb and not self.wandb_project:
            problems.append("metrics.wandb_project is empty; name the W&B project that the run belongs to.")
        return problems
