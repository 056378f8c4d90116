"""The optimizer of a model by role and parameter group, and optimizer state keyed by parameter name."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from titan_core.config import OptimizerConfig
from titan_core.optimizers.adamw import AdamW
from titan_core.optimizers.moments import wide_dtype
from titan_core.optimizers.muon import Muon
from titan_core.optimizers.param_groups import group_parameters


class OptimizerError(ValueError):
    """An optimizer's setting cannot take effect on the model; the message names it."""


def build_optimizer(model: nn.Module, roles: Mapping[str, str], config: OptimizerConfig, *, seed: int = 0) -> Optimizer:
    """AdamW (arXiv 1711.05101, algorithm 2), torch's where it can keep the moments as asked, or Muon and AdamW.

    `roles` as `resolve_roles` returns them for the whole model, of which `model` may be a pipeline's part; `seed`: what
    stochastic rounding draws from. All ranks that share parameters must call it together: Muon may make process groups.

    Raises:
        OptimizerError: if there is nothing to be rounded stochastically.
        ParamGroupError: if a group of `config` does not fit the model.
    """
    names = {parameter: fqn for fqn, parameter in model.named_parameters()}
    if config.parameter_rounding == "stochastic" and all(p.dtype != torch.bfloat16 for p in names):
        found = " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in names}))
        raise OptimizerError(
            f"optimizer.parameter_rounding stochastic is for weights that are kept in bfloat16, and these are {found}; "
            "keep them in bfloat16 (--precision.master-dtype bfloat16), or leave it at nearest."
        )
    groups: dict[str, list[dict[str, Any]]] = {"adamw": [], "muon": []}
    for treatment, parameters in group_parameters(model, roles, config).items():
        groups[treatment.optimizer].append(
            {
                "params": [(names[parameter], parameter) for parameter in parameters],
                "lr": config.lr * treatment.lr_factor,
                "lr_factor": treatment.lr_factor,
                "weight_decay": treatment.weight_decay,
            }
        )
    adamw, muon = groups["adamw"], groups["muon"]
    if not muon:
        return _adamw(adamw, config, seed)
    others = _adamw(adamw, config, seed) if adamw else None
    return Muon(muon, config.muon, others=others, state_dtype=config.state_dtype)


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig, seed: int) -> Optimizer:
    parameters = [parameter for group in groups for _, parameter in group["params"]]
    wide = all(wide_dtype(parameter) == parameter.dtype for parameter in parameters)
    if config.state_dtype != "float32" or config.state_offload or not wide:
        return AdamW(groups, config, seed=seed, on_host=config.state_offload)
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=all(p.device.type in ("cpu", "cuda", "xpu", "mps") for p in parameters),
    )


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of every group to `lr`, times the group's `lr_factor` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def step_unless(optimizer: Optimizer, skip: Tensor | None, number: int) -> None:
    """Moves parameters by their gradients, unless `skip`, a float32 scalar on their device, is 1.0.

    Then no parameter and no state changes, whatever the gradients are, and no host waits to know. `number`: of the
    step, counted from 1, by which stochastic rounding draws. `optimizer` is one that `build_optimizer` returns.
    """
    adamw = optimizer.others if isinstance(optimizer, Muon) else optimizer
    if isinstance(adamw, AdamW):
        adamw.number = number
    if skip is not None:
        skip = skip.to(optimizer.param_groups[0]["params"][0].device)  # elsewhere only where parameters are offloaded
    cast(Any, optimizer).found_inf = skip  # torch's own name for it, which its fused optimizers read
    optimizer.step()


class ModelState:
    """A model's parameters and persistent buffers under their names; a shared parameter appears once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, Tensor]:
        """FQN -> tensor; the tensors are the model's own."""
        persistent = self._model.state_dict(keep_vars=True).keys()
        buffers = {name: b for name, b in self._model.named_buffers() if name in persistent}
        return {name: p.detach() for name, p in self._model.named_parameters()} | buffers

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies `state` into the model's tensors."""
        own = self.state_dict()
        for name, tensor in state.items():
            if own[name] is not tensor:
                own[name].copy_(tensor)


class OptimizerState:
    """An optimizer's state under `<parameter name>.<state name>`, so that it does not know about the layout."""

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        self._optimizer = optimizer
        self._model = model

    def state_dict(self) -> dict[str, Tensor]:
        """`<FQN>.<state name>` -> tensor; creates the state of an optimizer that has not stepped yet."""
        if isinstance(self._optimizer, AdamW):
            self._optimizer.create_state()
        elif not self._optimizer.state:
            _create_state(self._optimizer)
        return {f"{fqn}.{name}": tensor for fqn, name, tensor in self._entries()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies `state` into the optimizer's tensors."""
        for key, own in self.state_dict().items():
            if own is not state[key]:
                own.copy_(state[key])

    def _entries(self) -> Iterator[tuple[str, str, Tensor]]:
        for fqn, parameter in self._model.named_parameters():
            for name, value in self._optimizer.state.get(parameter, {}).items():
                yield fqn, name, value


def _create_state(optimizer: Optimizer) -> None:
    """Lets an optimizer create its state without moving a parameter: a step at learning rate 0, then all zeros."""
    settings: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        settings.append({"lr": group["lr"], "weight_decay": group["weight_decay"]})
        group.update(lr=0.0, weight_decay=0.0)
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
