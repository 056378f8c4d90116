"""Norms of gradient, parameters and update of each layer: one pass of kernels and one exchange for all of them.

A parameter may be cut over ranks (a DTensor), copied on several, or live on one stage of a pipeline. Squares of all
local parts are added over all ranks; a part that several ranks hold is divided by their number, which is found out once
by counting elements. So the numbers are those of the whole parameters, whatever the layout.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_metrics.accumulator import Reading
from titan_metrics.compat import foreach_norms

_KINDS = ("gradient", "parameter", "update")


def layer_of(fqn: str) -> str:
    """The layer that a parameter belongs to: its name up to the first number in it, else its module's.

    `layers.3.attention.wq.weight` -> `layers.3`, `lm_head.weight` -> `lm_head`.
    """
    parts = fqn.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1]) or fqn


class ParameterNorms:
    """Measures one step of the optimizer, when it is asked to; costs nothing at other steps.

    Use it around the step that is to be measured, on all ranks:

        norms.before_update()
        optimizer.step()
        reading = norms.after_update()

    Args:
        parameters: of the model, by FQN, as on this rank.
        layer: the name under which parameters are put together.
        group: the ranks that hold the model together; None is all of them.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        layer: Callable[[str], str] = layer_of,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._group = group if group is not None or not dist.is_initialized() else dist.group.WORLD
        self._parameters = {fqn: parameter for fqn, parameter in parameters if parameter.requires_grad}
        own = {fqn: parameter.numel() for fqn, parameter in self._parameters.items()}
        held = {fqn: local(parameter).numel() for fqn, parameter in self._parameters.items()}
        copies = self._count_copies(own, held)
        self.names = sorted({layer(fqn) for fqn in copies})
        place = {name: i for i, name in enumerate(self.names)}
        # One divisor and one layer for each parameter of this rank.
        self._divisors = torch.tensor([copies[fqn] for fqn in self._parameters], dtype=torch.float64)
        self._places = torch.tensor([place[layer(fqn)] for fqn in self._parameters], dtype=torch.int64)
        self._before: list[Tensor] = []
        self._squares: list[Tensor] = []

    def _count_copies(self, whole: dict[str, int], held: dict[str, int]) -> dict[str, float]:
        """FQN of each parameter of any rank -> how many ranks hold each of its elements."""
        if self._group is None:
            return dict.fromkeys(whole, 1.0)
        parts: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(parts, (whole, held), group=self._group)
        sizes = {fqn: size for part, _ in parts for fqn, size in part.items()}
        return {fqn: sum(part.get(fqn, 0) for _, part in parts) / max(size, 1) for fqn, size in sizes.items()}

    @torch.no_grad()
    def before_update(self) -> None:
        """Measures gradients and parameters, and keeps a copy of this rank's part of them; waits for nothing."""
        parameters = [local(parameter) for parameter in self._parameters.values()]
        gradients = [
            torch.zeros_like(parameter) if owner.grad is None else local(owner.grad)
            for parameter, owner in zip(parameters, self._parameters.values(), strict=True)
        ]
        self._before = [parameter.clone() for parameter in parameters]
        self._squares = [self._by_layer(gradients), self._by_layer(parameters)]

    @torch.no_grad()
    def after_update(self) -> Reading:
        """`norms.gradient.LAYER`, `norms.parameter.LAYER` (before the update) and `norms.update.LAYER`."""
        for before, parameter in zip(self._before, self._parameters.values(), strict=True):
            before.sub_(local(parameter))
        squares = torch.cat([*self._squares, self._by_layer(self._before)])
        self._before, self._squares = [], []
        if self._group is not None:
            dist.all_reduce(squares, group=self._group)
        return Reading([f"norms.{kind}.{name}" for kind in _KINDS for name in self.names], squares.sqrt())

    def _by_layer(self, tensors: list[Tensor]) -> Tensor:
        """This rank's share of the sum of squares of each layer: float32 [layers]."""
        if not tensors:
            return torch.zeros(len(self.names), device=self._device())
        squares = torch.stack([norm.to(tensors[0].device) for norm in foreach_norms(tensors, torch.float32)]).square()
        shares = squares / self._divisors.to(squares)
        sums = torch.zeros(len(self.names), dtype=shares.dtype, device=shares.device)
        return sums.index_add_(0, self._places.to(shares.device), shares)

    def _device(self) -> torch.device:
        """Of the exchange, for a rank that holds no parameter."""
        return torch.device("cuda" if self._group is not None and dist.get_backend(self._group) == "nccl" else "cpu")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor.detach() if to_local is None else to_local().detach()
