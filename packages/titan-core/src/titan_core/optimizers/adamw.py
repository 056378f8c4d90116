"""AdamW that keeps its moments in few bytes, and takes its steps in few bytes too.

Parameters are worked on in runs of rows: the moments of a run become wide, torch's fused kernel takes the step, and
they are kept again in their format. So what is wide is never as large as a large parameter, and the arithmetic is that
of torch's AdamW. With the same gradients, moments and parameters get the same bits on every layout.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from titan_core.compat import fused_adamw, is_fake
from titan_core.config import OptimizerConfig
from titan_core.optimizers.blocks import as_rows
from titan_core.optimizers.moments import Moments, MomentStore, wide_dtype
from titan_core.optimizers.stochastic import Draws, low_half, round_stochastically
from titan_core.shards import local

# How many elements are wide at one time: as many as stay in a core's cache, or as keep a GPU busy.
_CPU_ELEMENTS = 2**18
_GPU_ELEMENTS = 2**23

# The CPU's kernel rounds otherwise in what is left over after whole vectors; of these elements nothing is.
_VECTORS = 64


class AdamW(Optimizer):
    """AdamW (arXiv 1711.05101, algorithm 2) with moments in the format that a configuration asks for.

    Each of `groups` has named parameters, plain or spread over ranks, its `lr` and its decoupled `weight_decay`. All
    ranks that have parts of a parameter make the optimizer with the same parameters in the same order, and step
    together. A parameter without a gradient is not changed. Save its state with `OptimizerState`.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], config: OptimizerConfig, *, seed: int, on_host: bool = False
    ) -> None:
        """`seed`: what stochastic rounding draws from; `on_host`: keep moments in the host's memory."""
        super().__init__(groups, defaults={})
        self._config, self._seed, self._on_host = config, seed, on_host
        self.found_inf: Tensor | None = None
        """1.0 where parameters live if the next step must change nothing, 0.0 if it may: a float32 scalar, or None."""
        self.number: int | None = None
        """The number of the next step, by which stochastic rounding draws; None: one more than were taken."""
        store = MomentStore(config.state_dtype, on_host=on_host)
        self._moments: dict[Tensor, Moments] = {
            parameter: store.moments_of(parameter) for group in self.param_groups for parameter in group["params"]
        }

    def create_state(self) -> None:
        """Gives moments of zero to parameters that have none."""
        for parameter, moments in self._moments.items():
            if not self.state[parameter]:
                step = torch.zeros((), dtype=torch.float32, device=parameter.device)
                self.state[parameter] = {"step": step} | moments.create()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses: torch's method would convert codes into numbers of the parameter's dtype."""
        raise RuntimeError(
            "torch's load_state_dict would cast moments to their parameter's dtype, which makes codes and bfloat16 "
            "moments meaningless; save and load titan_core.optim.OptimizerState(optimizer, model) instead."
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves all parameters by their gradients; returns what `closure`, if given, computes before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.create_state()
        if self._on_host and self.found_inf is not None and self.found_inf.item():
            return loss  # the host is waited for below in any case
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is not None:
                    self._move(name, parameter, parameter.grad, group)
        if self._on_host and torch.accelerator.is_available():
            torch.accelerator.current_stream().synchronize()  # what was sent to the host can be read now
        return loss

    def _move(self, name: str, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, moments = self.state[parameter], self._moments[parameter]
        state["step"] += 1
        numbers, gradients = as_rows(parameter), as_rows(gradient)
        wide = wide_dtype(parameter)
        for_moments = self._draws(parameter, name, "moments", self._config.state_rounding)
        for_numbers = self._draws(parameter, name, "parameter", self._config.parameter_rounding)
        kept = {key: as_rows(tensor) for key, tensor in state.items() if key != "step"}
        for rows in row_runs(parameter, len(numbers)):
            with _unchanged_if(self.found_inf, [numbers[rows], *(tensor[rows] for tensor in kept.values())]):
                first, second = moments.read(state, rows)
                moved = numbers[rows].to(wide)
                _take_step(
                    [moved, gradients[rows].to(wide), first, second],
                    state["step"],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    betas=(self._config.beta1, self._config.beta2),
                    eps=self._config.eps,
                    found_inf=self.found_inf,
                )
                moments.write(state, rows, first, second, for_moments.bits(rows) if for_moments else None)
                if for_numbers and parameter.dtype == torch.bfloat16:
                    moved = round_stochastically(moved, low_half(for_numbers.bits(rows)))
                numbers[rows].copy_(moved)
        if self.found_inf is not None:
            state["step"] -= self.found_inf

    def _draws(self, parameter: Tensor, name: str, purpose: str, rounding: str) -> Draws | None:
        if rounding != "stochastic":
            return None
        step = self.state[parameter]["step"]
        number = self.number or (1 if is_fake(step) else int(step))  # what is fake has no value
        return Draws(parameter, self._seed, number, name, purpose)


def row_runs(parameter: Tensor, rows: int) -> Iterable[slice]:
    """The runs of this rank's `rows` rows to work on, as many on each rank that has parts of the same rows."""
    # What is fake stands for a GPU's, or is at least not worth a loop.
    small = parameter.device.type == "cpu" and not is_fake(local(parameter))
    most = _CPU_ELEMENTS if small else _GPU_ELEMENTS
    height = max(1, most // max(1, parameter.shape[-1])) if parameter.ndim else 1
    return (slice(start, min(start + height, rows)) for start in range(0, rows, height))


@contextlib.contextmanager
def _unchanged_if(skip: Tensor | None, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Puts `tensors` back to what they were if `skip` is 1.0, without reading it."""
    if skip is None:
        yield
        return
    before = [tensor.clone() for tensor in tensors]
    yield
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(skip > 0, old, tensor))


def _take_step(tensors: list[Tensor], number: Tensor, **settings: Any) -> None:
    """The step `number` of [parameter, gradient, first moment, second moment], all in the same dtype and shape."""
    size = tensors[0].numel()
    if tensors[0].device.type == "cpu" and size % _VECTORS:
        padded = [F.pad(tensor.flatten(), (0, -size % _VECTORS)) for tensor in tensors]
        fused_adamw(padded, number, **settings)
        for i in (0, 2, 3):
            tensors[i].copy_(padded[i][:size].view_as(tensors[i]))
    elif size:
        fused_adamw(tensors, number, **settings)
