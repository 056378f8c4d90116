"""Scalars that stay on the device until a step is logged, and then travel to the host together.

Reading a tensor makes the host wait for all that the device still has to do. A loop that does so each step leaves the
device idle while the host prepares the next one. An `Accumulator` keeps what it is given as it is; `read` combines it
on the device, adds it up over ranks, and starts one copy to the host. The `Reading` it returns can be asked at once,
which waits, or later, when the numbers are there: `DeferredLog` logs each line as soon as that costs nothing. It also
keeps the host from running ahead by more than a line, so that a `Meter` read beside it keeps the device's pace.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from titan_metrics.sinks import Sinks

Reduce = Callable[[Tensor, Literal["sum", "max"]], Tensor]
"""Sums a tensor [n] over the ranks, or takes the greatest of each element; in place, or as a new tensor."""


@dataclass(frozen=True, kw_only=True)
class Over:
    """How the values of one name become one number."""

    steps: Literal["last", "mean", "sum", "max"] = "last"
    """Over the steps since the last reading."""
    ranks: Literal["same", "sum", "max"] = "same"
    """Over ranks; `same` if all ranks have the same value anyway."""


class Reading:
    """Numbers on their way to the host.

    Args:
        names: of the numbers.
        values: one number each, on their device: [n].
    """

    def __init__(self, names: Sequence[str], values: Tensor) -> None:
        self._names = list(names)
        self._event: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            # Only into pinned memory is a copy asynchronous.
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values.detach().clone()

    def ready(self) -> bool:
        """Whether `numbers` would not wait."""
        return self._event is None or self._event.query()

    def numbers(self) -> dict[str, float]:
        """The numbers by name; waits for the device until they are there."""
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))


class Accumulator:
    """Collects scalars, one value of each name a step.

    Args:
        over: how the values of each name are combined over steps and ranks.
        reduce: exchanges numbers with the other ranks; None if there are none.
    """

    def __init__(self, over: Mapping[str, Over], reduce: Reduce | None = None) -> None:
        self._over = dict(over)
        self._reduce = reduce
        self._values: dict[str, list[Tensor]] = {name: [] for name in over}

    def add(self, **values: Tensor) -> None:
        """Takes scalar tensors, which are not read; they must not be changed in place afterwards.

        Raises:
            ValueError: if a name was not declared.
        """
        for name, value in values.items():
            if name not in self._values:
                raise ValueError(f"{name!r} was not declared to this Accumulator; it knows {sorted(self._values)}.")
            kept = self._values[name]
            if self._over[name].steps == "last":
                kept.clear()
            kept.append(value.detach())

    @torch.no_grad()
    def read(self) -> Reading | None:
        """Combines what was added since the last reading, over ranks too: all must call it. None if nothing was added.

        The ranks must have added the same names. Numbers are float64 where the device has it, so that counts are exact.
        """
        found = {name: values for name, values in self._values.items() if values}
        self._values = {name: [] for name in self._over}
        if not found:
            return None
        device = next(iter(found.values()))[0].device
        wide = torch.float32 if device.type == "mps" else torch.float64
        ordered = sorted(found, key=lambda name: self._over[name].ranks)  # one exchange for all of a kind
        combined = torch.stack([self._combine(name, found[name], wide) for name in ordered])
        if self._reduce is not None:
            for kind in ("max", "sum"):
                places = [i for i, name in enumerate(ordered) if self._over[name].ranks == kind]
                if places:
                    part = slice(places[0], places[-1] + 1)
                    combined[part] = self._reduce(combined[part].clone(), kind)
        return Reading(ordered, combined)

    def _combine(self, name: str, values: list[Tensor], wide: torch.dtype) -> Tensor:
        if len(values) == 1:
            return values[0].reshape(()).to(wide)
        stacked = torch.stack([value.reshape(()) for value in values]).to(wide)
        return {"mean": stacked.mean, "sum": stacked.sum, "max": stacked.amax}[self._over[name].steps]()


class DeferredLog:
    """Hands lines to sinks in their order, each when the device has delivered its numbers.

    At most `behind` lines wait; an older one is waited for. So a device is never kept waiting by its host, and a host
    is never further ahead of its device than that many lines. On a CPU every line is logged at once.
    """

    def __init__(self, sinks: Sinks, behind: int = 1) -> None:
        self._sinks = sinks
        self._behind = behind
        self._lines: deque[tuple[int, dict[str, float | int | str], Sequence[Reading]]] = deque()

    def log(self, step: int, values: Mapping[str, float | int | str], *readings: Reading | None) -> None:
        """Logs `values` and the readings' numbers, now or with a later call."""
        self._lines.append((step, dict(values), [reading for reading in readings if reading is not None]))
        while self._lines and (len(self._lines) > self._behind or all(r.ready() for r in self._lines[0][2])):
            self._hand_over()

    def flush(self) -> None:
        """Logs all lines, waiting for the device if need be: at the end of a run, before a checkpoint, at a failure."""
        while self._lines:
            self._hand_over()

    def _hand_over(self) -> None:
        step, values, readings = self._lines.popleft()
        for reading in readings:
            values |= reading.numbers()
        self._sinks.log(step, values)
