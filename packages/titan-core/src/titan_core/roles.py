"""Roles: what core needs to know about the modules of a model, and all it knows.

A model comes with a mapping from FQN pattern to role. `ROLES` says what each technique does with a role; a new
model lists roles, a new technique adds a column, and nothing else couples the two. Imports no torch.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn


class RoleError(ValueError):
    """A model and its roles do not fit; the message names the module or pattern."""


# What tensor parallelism does with a module; titan_core.tensor says how.
TensorStyle = Literal["vocabulary", "region", "column", "row", "sequence", "heads", "loss"]


@dataclass(frozen=True, kw_only=True)
class Role:
    """One row of the table."""

    meaning: str
    """What a module with this role does, and how it is called."""
    unit: bool = False
    """Whether FSDP gathers its parameters together with everything below it, on its own; what activation
    recomputation, compilation and pipeline splitting work on."""
    tensor: TensorStyle | None = None
    """How tensor parallelism changes it."""
    context: bool = False
    """Whether context parallelism replaces it."""
    expert: bool = False
    """Whether its parameters have one slice an expert, which expert parallelism cuts."""
    routes: bool = False
    """Whether it counts tokens, over whole rows and whole batches."""


ROLES: Mapping[str, Role] = {
    "embedding": Role(meaning="looks up tokens [B, S] -> [B, S, D]", unit=True, tensor="vocabulary"),
    "block": Role(meaning="one layer, hidden [B, S, D] -> [B, S, D]", unit=True),
    "region": Role(
        meaning="a part between two points of the residual stream, region(hidden [B, S, D], ...) -> [B, S, D]",
        tensor="region",
    ),
    "colwise": Role(meaning="a linear layer of a region into an inner dimension, [.., D] -> [.., F]", tensor="column"),
    "rowwise": Role(meaning="the linear layer of a region back to the stream, [.., F] -> [.., D]", tensor="row"),
    "attention": Role(meaning="attention(q, k, v, positions, document_ids) on [B, S, heads, H]", context=True),
    "norm": Role(meaning="normalises the last dimension of the stream, [.., D] -> [.., D]", tensor="sequence"),
    "head_norm": Role(meaning="normalises each head, [.., heads, H] -> [.., heads, H]", tensor="heads"),
    "router": Role(
        meaning="chooses experts; has `load` [E], `sum_over_sequence` and finish_step(load [E])", routes=True
    ),
    "gate": Role(meaning="the linear layer of a router, hidden [.., D] -> [.., E]", tensor="sequence"),
    "experts": Role(meaning="experts(x [T, D] sorted by expert, counts [E]) -> [T, D]", expert=True),
    "head": Role(meaning="head(hidden, labels=None): logits [B, S, V], or the summed loss", tensor="loss"),
}


def resolve_roles(model: "nn.Module", patterns: Mapping[str, str]) -> dict[str, str]:
    """FQN of each module that has a role -> its role, in the model's order.

    Raises:
        RoleError: if a role is unknown, a pattern matches nothing, two patterns with different roles match one
            module, a module holds parameters of its own but has no role (it would silently miss a technique), or
            a colwise or rowwise layer lies outside of every region.
    """
    for pattern, role in patterns.items():
        if role not in ROLES:
            close = difflib.get_close_matches(role, ROLES, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise RoleError(f"{pattern!r} has the unknown role {role!r}; known are {', '.join(ROLES)}.{hint}")
    resolved: dict[str, str] = {}
    unused = set(patterns)
    for fqn, module in model.named_modules():
        matching = [pattern for pattern in patterns if matches(pattern, fqn)]
        unused -= set(matching)
        found = {patterns[pattern] for pattern in matching}
        if len(found) > 1:
            raise RoleError(f"Module {fqn!r} has the roles {sorted(found)}; its patterns {matching} overlap.")
        if found:
            resolved[fqn] = found.pop()
        elif next(module.parameters(recurse=False), None) is not None:
            raise RoleError(f"Module {fqn!r} holds parameters but has no role; add its name to the model's roles.")
    _check_regions(resolved)
    if unused:
        raise RoleError(f"No module of the model matches the role patterns {sorted(unused)}.")
    return resolved


def _check_regions(resolved: Mapping[str, str]) -> None:
    for fqn, role in resolved.items():
        if role in ("colwise", "rowwise") and enclosing(fqn, resolved, "region") is None:
            raise RoleError(
                f"Module {fqn!r} is {role} but lies in no region; give the module around it, whose input and output "
                f"are hidden states, the role 'region'."
            )


def enclosing(fqn: str, roles: Mapping[str, str], role: str) -> str | None:
    """The FQN of the innermost module around `fqn` that has `role`, or None."""
    while fqn:
        fqn = fqn.rpartition(".")[0]
        if roles.get(fqn) == role:
            return fqn
    return None


def role_of_parameter(fqn: str, roles: Mapping[str, str]) -> str:
    """The role of the module that owns the parameter `fqn`; `roles` as `resolve_roles` returns them."""
    return roles[fqn.rpartition(".")[0]]


def matches(pattern: str, fqn: str) -> bool:
    """Whether `fqn` fits `pattern`, in which `*` stands for any characters between two dots."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]*"), fqn) is not None


def first_match(patterns: Iterable[str], fqn: str) -> str | None:
    """The first pattern that `fqn` fits."""
    return next((pattern for pattern in patterns if matches(pattern, fqn)), None)
