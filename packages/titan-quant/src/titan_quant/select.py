"""Which linear layers of a model a rewrite works on, and why it leaves the others alone."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from titan_quant.linear import LowPrecisionLinear

# How models without roles call the layer that makes logits. It is a small part of the work, and the loss feels its
# rounding first.
_USUAL_ROLES = ("colwise", "rowwise")  # the default, of which a model may lack one
_HEADS = ("lm_head", "head", "output", "embed_out", "classifier", "score")


class SelectionError(ValueError):
    """A pattern that fits nothing, or a named layer that cannot be rewritten."""


def select_linears(
    model: nn.Module,
    roles: Mapping[str, str] | None,
    *,
    wanted: Sequence[str],
    include: Sequence[str],
    exclude: Sequence[str],
    option: str,
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The linear layers of `model` to rewrite by name, and for the others why they are left alone.

    With `roles` (FQN -> role) those are chosen whose role is `wanted`, without them all but the head; also what
    `include` names, and nothing that `exclude` names. `option` begins the names of these lists in messages.

    Raises:
        SelectionError: if a name of `include` or `exclude` fits nothing, nothing has a wanted role, or a layer so
            included is not computed as `nn.Linear` does.
    """
    if roles is not None and (lost := [role for role in wanted if role not in (*_USUAL_ROLES, *roles.values())]):
        raise SelectionError(
            f"{option}.roles: nothing in the model has the role {', '.join(map(repr, lost))}. There are "
            f"{', '.join(sorted(set(roles.values())))}."
        )
    modules = dict(model.named_modules())
    _check_patterns(modules, exclude, f"{option}.exclude")
    linears = {fqn: module for fqn, module in modules.items() if isinstance(module, nn.Linear)}
    _check_patterns(linears, include, f"{option}.include", "linear layer")
    embeddings = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    chosen: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    for fqn, module in linears.items():
        named = fits(fqn, include)
        own_way = type(module).forward not in (nn.Linear.forward, LowPrecisionLinear.forward)
        if named and own_way:
            raise SelectionError(
                f"{option}.include names {fqn!r}, a {type(module).__name__}, which does not compute as nn.Linear does: "
                "rewriting it would lose what it does. Leave it out."
            )
        if fits(fqn, exclude):
            skipped[fqn] = "excluded by name"
        elif named:
            chosen[fqn] = module
        elif own_way:
            skipped[fqn] = "computed in its own way"
        elif roles is not None and roles.get(fqn) not in wanted:
            skipped[fqn] = f"its role is {roles.get(fqn, 'none')}"
        elif roles is None and (fqn.rpartition(".")[2] in _HEADS or id(module.weight) in embeddings):
            skipped[fqn] = "the head"
        else:
            chosen[fqn] = module
    return chosen, skipped


def fits(fqn: str, patterns: Iterable[str]) -> bool:
    """Whether `fqn` fits one of `patterns`, in which `*` stands for any characters."""
    return any(fnmatch.fnmatchcase(fqn, pattern) for pattern in patterns)


def _check_patterns(names: Iterable[str], patterns: Sequence[str], option: str, kind: str = "module") -> None:
    names = [name for name in names if name]
    lost = [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]
    if lost:
        raise SelectionError(
            f"{option}: no {kind} of the model has a name that fits {', '.join(map(repr, lost))}. "
            f"There are, for example, {', '.join(map(repr, names[:3]))}."
        )
