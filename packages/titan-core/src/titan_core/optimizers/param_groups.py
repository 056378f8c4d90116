"""Which parameters an optimizer treats alike: by their roles, and by the groups of the configuration."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from torch import Tensor, nn

from titan_core.config import OptimizerConfig, ParamGroupConfig
from titan_core.roles import ROLES, first_match, role_of_parameter

# The matrices of linear layers inside of blocks. Those of embedding and head have one row a token, of which most get no
# gradient in a step, so that their singular values mean little.
_MUON_ROLES = ("colwise", "rowwise", "gate", "experts")


class ParamGroupError(ValueError):
    """A parameter group does not fit the model; the message names it."""


class Treatment(NamedTuple):
    """What an optimizer does with a parameter."""

    optimizer: Literal["adamw", "muon"]
    lr_factor: float
    weight_decay: float


def group_parameters(
    model: nn.Module, roles: Mapping[str, str], config: OptimizerConfig
) -> dict[Treatment, list[nn.Parameter]]:
    """The trainable parameters of `model` by their treatment; a shared one counts under its first name.

    `roles` as `resolve_roles` returns them for the whole model, of which `model` may be a part.

    Raises:
        ParamGroupError: if a group asks for Muon for what is no matrix or, where `model` is the whole, decides about no
            parameter (see `check_groups`).
    """
    modules = {fqn for fqn, _ in model.named_modules()}
    if modules.issuperset(roles):
        check_groups(model, roles, config.groups)
    treated: dict[Treatment, list[nn.Parameter]] = {}
    for fqn, parameter in model.named_parameters():
        if parameter.requires_grad:
            treated.setdefault(_treatment(fqn, parameter, _role(fqn, roles), config), []).append(parameter)
    return treated


def check_groups(model: nn.Module, roles: Mapping[str, str], groups: Sequence[ParamGroupConfig]) -> None:
    """Raises `ParamGroupError` if one of `groups` decides about no trainable parameter of the whole `model`.

    Call it before a pipeline cuts the model: a group may well fit nothing on one rank.
    """
    trainable = [fqn for fqn, parameter in model.named_parameters() if parameter.requires_grad]
    deciding = {_group_of(fqn, _role(fqn, roles), groups) for fqn in trainable}
    for i, group in enumerate(groups):
        if i not in deciding:
            taken = any(_fits(group, fqn, _role(fqn, roles)) for fqn in trainable)
            why = "fits only parameters that earlier groups take" if taken else "fits no trainable parameter"
            known = sorted({_role(fqn, roles) for fqn in trainable})
            raise ParamGroupError(
                f"optimizer.groups[{i}] (roles {list(group.roles)}, patterns {list(group.patterns)}) {why}; name "
                f"others, or remove it. The model's roles are {known}, its parameters {trainable[0]} to "
                f"{trainable[-1]}; the first group that fits counts."
            )


def _role(fqn: str, roles: Mapping[str, str]) -> str:
    return "bias" if fqn.endswith(".bias") else role_of_parameter(fqn, roles)


def _fits(group: ParamGroupConfig, fqn: str, role: str) -> bool:
    return role in group.roles or first_match(group.patterns, fqn) is not None


def _group_of(fqn: str, role: str, groups: Sequence[ParamGroupConfig]) -> int | None:
    return next((i for i, group in enumerate(groups) if _fits(group, fqn, role)), None)


def _treatment(fqn: str, parameter: Tensor, role: str, config: OptimizerConfig) -> Treatment:
    i = _group_of(fqn, role, config.groups)
    group = ParamGroupConfig() if i is None else config.groups[i]
    matrix = role in ROLES and parameter.ndim == (3 if ROLES[role].expert else 2)
    if group.optimizer == "muon" and not matrix:
        raise ParamGroupError(
            f"optimizer.groups[{i}] asks for muon for {fqn!r}, whose role is {role!r} and whose shape is "
            f"{tuple(parameter.shape)}: Muon is for matrices. Name fewer parameters in the group, or put a group with "
            "optimizer 'adamw' that fits this one before it."
        )
    usual = "muon" if config.name == "muon" and matrix and role in _MUON_ROLES else "adamw"
    decay = 0.0 if role in config.no_decay else config.weight_decay
    return Treatment(
        optimizer=group.optimizer or usual,
        lr_factor=group.lr_factor,
        weight_decay=decay if group.weight_decay is None else group.weight_decay,
    )
