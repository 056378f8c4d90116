"""Throughput and utilization of a training loop, from wall-clock time and token counts alone.

The meter never touches a device: reading it costs no synchronization. So its clock is right only if it is read
where the host has already waited for the device, for example just after the loss was moved to the host.

Model FLOPs utilization (MFU) is the share of the hardware's peak that a run spends on the model's own arithmetic:

    MFU = tokens per second x FLOPs per token / (devices x peak FLOP/s of one device)

(Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, arXiv:2204.02311, appendix B.) FLOPs per
token are those that the model's forward and backward pass need, three times the forward pass. Arithmetic done twice
to save memory (activation checkpointing) is not counted: a ratio that counts it is hardware FLOPs utilization (HFU),
which rises when a run gets slower by recomputing more.

Two conventions for attention are in use, and `flops_per_token` decides between them. *Full* attention counts every
pair of query and key, as PaLM's own formula 6N + 12LHQT does. *Causal* counts the pairs that the mask leaves, half of
them for long sequences, fewer for sliding windows and packed documents: the work that a kernel which skips masked
blocks has to do. The same run has the greater MFU by the full convention.
"""

import time
from collections.abc import Callable


class Meter:
    """Tokens per second, TFLOP/s and MFU between one reading and the next.

    The first window opens when the meter is made, each later one where the last was read, and everything that
    happens in a window counts, the first step's warm-up and compilation for example, but what is said to `leave_out`:
    validation or saving a checkpoint, which are no steps. `restart` opens a new window.

    Args:
        flops_per_token: FLOPs of one token's forward and backward pass; None leaves TFLOP/s and MFU out.
        peak_flops: dense peak FLOP/s of one device (`titan_metrics.peaks`); None leaves MFU out.
        devices: how many devices share the work.
        clock: seconds from any fixed point, never going back.
    """

    def __init__(
        self,
        flops_per_token: float | None,
        peak_flops: float | None,
        devices: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        for name, value in (("flops_per_token", flops_per_token), ("peak_flops", peak_flops), ("devices", devices)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be positive. Pass None for FLOPs that are unknown.")
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._devices = devices
        self._clock = clock
        self._open(clock())

    def restart(self) -> None:
        """Opens a new window here and forgets what was added since the last reading."""
        self._open(self._clock())

    def _open(self, at: float) -> None:
        self._opened = at
        self._steps = 0
        self._tokens = 0
        self._flops = 0.0
        self._data_wait_seconds = 0.0
        self._left_out_seconds = 0.0

    def leave_out(self, seconds: float) -> None:
        """Takes so much time, in which nothing was done for a step, out of this window.

        A device must not have worked on steps in it: wait for the device before you begin to measure.
        """
        self._left_out_seconds += seconds

    def add(self, *, tokens: int, data_wait_seconds: float = 0.0, flops: float | None = None) -> None:
        """Counts one step: the tokens of its *global* batch, and how long this process waited for data.

        `flops`: of the step, where they are not `tokens` times `flops_per_token`, since documents confine attention.
        """
        self._steps += 1
        self._tokens += tokens
        self._flops += flops if flops is not None else tokens * (self._flops_per_token or 0.0)
        self._data_wait_seconds += data_wait_seconds

    def read(self) -> dict[str, float]:
        """Measures the steps since the last reading and opens the next window.

        Returns:
            `tokens_per_second` (all devices), `tokens_per_second_per_device`, `step_seconds` (mean),
            `data_wait_share` (0 to 1), and where they are known `tflops_per_device` and `mfu` (0 to 1). Empty if no
            step was added or no time has passed; the window then stays open.
        """
        now = self._clock()
        seconds = now - self._opened - self._left_out_seconds
        if self._steps == 0 or seconds <= 0:
            return {}
        per_device = self._tokens / seconds / self._devices
        values = {
            "tokens_per_second": self._tokens / seconds,
            "tokens_per_second_per_device": per_device,
            "step_seconds": seconds / self._steps,
            "data_wait_share": self._data_wait_seconds / seconds,
        }
        if self._flops_per_token is not None:
            achieved = self._flops / seconds / self._devices
            values["tflops_per_device"] = achieved / 1e12
            if self._peak_flops is not None:
                values["mfu"] = achieved / self._peak_flops
        self._open(now)
        return values
