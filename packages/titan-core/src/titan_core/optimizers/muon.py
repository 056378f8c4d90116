"""Muon: the momentum of each weight matrix is made orthogonal, as a whole, before it is added to the weights.

Sources: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon; the scale that suits AdamW's learning rates: arXiv 2502.16982, section 2.2.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from titan_core.config import MuonConfig, StateDtype
from titan_core.optimizers.whole_matrices import WholeMatrices, own_stack
from titan_core.shards import local

# Coefficients of x -> a x + b x^3 + c x^5 that Jordan et al. chose: steep at zero, between 0.68 and 1.14 near one.
_A, _B, _C = 3.4445, -4.7750, 2.0315


class Muon(Optimizer):
    """Muon for matrices, and another optimizer for everything else, as one.

    Each of `groups` has parameters [rows, columns] or [E, rows, columns], plain or spread over ranks, its `lr` and its
    decoupled `weight_decay`. The groups of `others` are among the optimizer's too, and moved by it. All ranks that have
    parts of a parameter make the optimizer with the same parameters in the same order, and step together. A parameter
    without a gradient is not changed. The state of a matrix is its `momentum`, spread as the parameter is.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        config: MuonConfig,
        *,
        others: Optimizer | None = None,
        state_dtype: StateDtype = "float32",
    ) -> None:
        """`state_dtype`: how momentum is kept (see `momentum_dtype`)."""
        self._config, self.others, self._state_dtype = config, others, state_dtype
        self.found_inf: Tensor | None = None
        """1.0 where parameters live if the next step must change nothing, 0.0 if it may: a float32 scalar, or None."""
        matrices = [{**group, "orthogonal": True} for group in groups]
        super().__init__([*matrices, *(others.param_groups if others else [])], defaults={})
        dtype: torch.dtype = getattr(torch, config.ns_dtype)
        self._whole = WholeMatrices([parameter for parameter, _ in self._matrices()], dtype)

    def _matrices(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """The parameters that are Muon's, each with its group."""
        return [(p, group) for group in self.param_groups if "orthogonal" in group for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves all parameters by their gradients; returns what `closure`, if given, computes before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.others is not None:
            # Not once and for all in __init__: loading a state dict replaces both.
            self.others.param_groups = [group for group in self.param_groups if "orthogonal" not in group]
            self.others.state = self.state
            cast(Any, self.others).found_inf = self.found_inf
            self.others.step()
        self._accumulate()
        matrices = self._matrices()
        self._whole.apply(
            lambda whole: orthogonalise(whole, self._config.ns_steps),
            lambda i, part: self._update(matrices[i][0], part),
            lambda i, part, result: self._move(*matrices[i], part, result),
        )
        return loss

    def _accumulate(self) -> None:
        momenta, gradients = [], []
        for parameter, _ in self._matrices():
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter, dtype=momentum_dtype(parameter, self._state_dtype))
            momentum, gradient = local(state["momentum"]), local(parameter.grad)
            if self.found_inf is not None:  # even nothing of a NaN is a NaN
                gradient.masked_fill_(self.found_inf > 0, 0.0)
            if momentum.dtype == gradient.dtype:
                momenta.append(momentum)
                gradients.append(gradient)
            else:
                wide = torch.promote_types(momentum.dtype, gradient.dtype)
                share = self._unless_skipped(1 - self._config.momentum, wide)
                momentum.copy_(momentum.to(wide).lerp_(gradient.to(wide), share))
        if momenta and self.found_inf is None:
            torch._foreach_lerp_(momenta, gradients, 1 - self._config.momentum)
        for momentum, gradient in zip(momenta, gradients, strict=True) if self.found_inf is not None else ():
            momentum.lerp_(gradient, self._unless_skipped(1 - self._config.momentum, momentum.dtype))

    def _unless_skipped(self, number: float, dtype: torch.dtype, otherwise: float = 0.0) -> Any:
        """`number`, or `otherwise` if the step must change nothing: a scalar on the device if that is not known."""
        if self.found_inf is None:
            return number
        on_device = torch.full((), number, dtype=dtype, device=self.found_inf.device)
        return on_device.masked_fill_(self.found_inf > 0, otherwise)

    def _update(self, parameter: Tensor, part: slice) -> Tensor:
        """What is to be made orthogonal."""
        if parameter.grad is None:
            return torch.zeros_like(own_stack(parameter)[part])
        momentum = own_stack(self.state[parameter]["momentum"])[part]
        if not self._config.nesterov:
            return momentum
        gradient = own_stack(parameter.grad)[part]
        wide = torch.promote_types(momentum.dtype, gradient.dtype)
        return gradient.to(wide).lerp(momentum.to(wide), self._config.momentum)

    def _move(self, parameter: Tensor, group: dict[str, Any], part: slice, orthogonal: Tensor) -> None:
        if parameter.grad is None:
            return
        rows, columns = parameter.shape[-2:]
        scale = 0.2 * max(rows, columns) ** 0.5 if self._config.scale == "rms" else max(1.0, rows / columns) ** 0.5
        matrices = own_stack(parameter)[part]
        matrices.mul_(self._unless_skipped(1 - group["lr"] * group["weight_decay"], matrices.dtype, 1.0))
        orthogonal = orthogonal.to(matrices)
        if self.found_inf is not None:
            orthogonal = orthogonal.masked_fill(self.found_inf > 0, 0.0)
        matrices.add_(orthogonal, alpha=-group["lr"] * scale)


def momentum_dtype(parameter: Tensor, state_dtype: StateDtype) -> torch.dtype:
    """That of the momentum of `parameter`: bfloat16 if that is asked for, else at least float32."""
    return torch.bfloat16 if state_dtype == "bfloat16" else torch.promote_types(parameter.dtype, torch.float32)


def orthogonalise(matrices: Tensor, steps: int) -> Tensor:
    """`matrices` [n, rows, columns] with their singular values brought near 1; a matrix of zeros stays what it is.

    `steps` Newton-Schulz iterations with the quintic of Jordan et al., in the dtype of `matrices`.
    """
    rows, columns = matrices.shape[-2:]
    x = matrices.mT if rows > columns else matrices
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide)
    x = (x / norm.clamp(min=torch.finfo(wide).tiny)).to(x.dtype)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if rows > columns else x
