"""Training on one device, with the same mixed precision that FSDP gives on many.

FSDP computes with `param_dtype` copies of its parameters and hands the optimizer gradients in the parameters' own
dtype. `SingleDevice` does exactly that without shards: parameters are cast once a step, modules see the copies while
a micro-batch runs, and each gradient is added to its parameter's as soon as it exists.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from titan_core.micro_batches import MicroBatchLoop
from titan_core.routers import Routers


class SingleDevice(MicroBatchLoop):
    """Runs micro-batches of `model` on one device, with parameters and gradients cast as asked."""

    def __init__(
        self, model: nn.Module, size: int, routers: Routers, *, param_dtype: torch.dtype, reduce_dtype: torch.dtype
    ) -> None:
        super().__init__(model, size, routers)
        self._param_dtype = param_dtype
        self._reduce_dtype = reduce_dtype
        self._slots: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._copies: dict[nn.Parameter, nn.Parameter] = {}

    @torch.no_grad()
    def begin_step(self) -> None:
        """Casts the parameters as the optimizer left them; call it before the first micro-batch of a step."""
        if not self._copies:  # not in __init__, since a model gets its memory after it is laid out
            self._make_copies()
        if self._copies:
            torch._foreach_copy_(list(self._copies.values()), list(self._copies))

    def _make_copies(self) -> None:
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if parameter.dtype == self._param_dtype:
                    continue
                self._slots.append((module, name, parameter))
                if parameter not in self._copies:
                    self._copies[parameter] = self._copy(parameter)

    def _copy(self, parameter: nn.Parameter) -> nn.Parameter:
        copy = nn.Parameter(torch.empty_like(parameter, dtype=self._param_dtype), parameter.requires_grad)

        def hand_over(copy: Tensor) -> None:
            if copy.grad is None:
                return
            gradient = copy.grad.to(self._reduce_dtype)
            copy.grad = None
            if parameter.grad is None:
                parameter.grad = gradient.to(parameter.dtype)
            else:
                parameter.grad += gradient

        if copy.requires_grad:
            copy.register_post_accumulate_grad_hook(hand_over)
        return copy

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Within it, forward and backward use the cast parameters; `last` is the step's last micro-batch."""
        for module, name, parameter in self._slots:
            module.register_parameter(name, self._copies[parameter])
        try:
            yield
        finally:
            for module, name, parameter in self._slots:
                module.register_parameter(name, parameter)

    def end_evaluation(self) -> None:
        """Nothing to undo: the next step casts the parameters anew."""

    def gradient_bytes(self) -> int:
        """Bytes that gradients take on this device while micro-batches accumulate."""
        return 0
