"""Takes state dicts apart into tensors, which go to DCP, and JSON values, which go to `state.json`.

A state dict is a mapping, nested or not, whose leaves are tensors (plain or DTensor) or JSON values (a list is
one value). A leaf's key is the names on the way to it, joined by dots: `optimizer.layers.0.weight.exp_avg`.
So nothing is ever pickled, and the names can be compared before anything is touched.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from titan_ckpt.manifest import Json

_NAME = re.compile(r"[A-Za-z0-9_-]+")


class Stateful(Protocol):
    """An object that can be saved and restored.

    `state_dict` must have the same keys before a load as it had when it was saved (an optimizer has to create
    its state first): it is called to learn where the tensors go, and they are filled in place.
    """

    def state_dict(self) -> dict[str, Any]:
        """The state, as a mapping of tensors, JSON values and such mappings."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Takes over a state of the form that `state_dict` returns."""
        ...


@dataclass(frozen=True)
class Flat:
    """The leaves of a state dict by their keys."""

    tensors: dict[str, torch.Tensor]
    values: dict[str, Json]

    @property
    def keys(self) -> set[str]:
        """All keys."""
        return self.tensors.keys() | self.values.keys()


def check_names(*groups: Mapping[str, object]) -> None:
    """Raises ValueError if the names of the saved objects could be mistaken for one another in a key."""
    names = [name for group in groups for name in group]
    wrong = [name for name in names if not _NAME.fullmatch(name) or names.count(name) > 1]
    if wrong:
        raise ValueError(
            f"The names {wrong} cannot be used: a name has letters, digits, '_' and '-' only and is used once"
        )


def flatten(tree: Mapping[Any, Any]) -> Flat:
    """Takes a nested state dict apart.

    Raises:
        ValueError: listing all leaves that are neither tensors nor JSON, and all keys that occur twice.
    """
    flat = Flat({}, {})
    problems = []
    for key, leaf in _leaves(tree, ""):
        if key in flat.tensors or key in flat.values:
            problems.append(f"{key} occurs twice")
        elif isinstance(leaf, torch.Tensor) and (leaf.layout is not torch.strided or leaf.is_quantized):
            problems.append(f"{key} is a tensor of layout {leaf.layout} and dtype {leaf.dtype}")
        elif isinstance(leaf, torch.Tensor):
            flat.tensors[key] = leaf
        elif is_json(leaf):
            flat.values[key] = leaf
        else:
            problems.append(f"{key} is {_described(leaf)}")
    if problems:
        raise ValueError(
            f"These cannot be saved: {'; '.join(problems)}. A leaf of a state dict is a dense tensor or a JSON value "
            "(None, bool, int, float, str, or a list or str-keyed dict of them without tensors)"
        )
    return flat


def tensors_only(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """The same nested mapping without values and without mappings that hold no tensors; keys are strings."""
    kept = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            value = tensors_only(value) or None
        if isinstance(value, (torch.Tensor, dict)):
            kept[str(key)] = value
    return kept


def with_values(tree: Mapping[Any, Any], values: Mapping[str, Json], key: str = "") -> dict[Any, Any]:
    """A copy of a nested state dict (its tensors shared) with the values replaced by those of their keys."""
    # A copy of the same kind: a module's state dict has attributes of its own.
    filled: dict[Any, Any] = copy.copy(tree) if isinstance(tree, dict) else dict(tree)
    for name, leaf in tree.items():
        below = f"{key}.{name}" if key else str(name)
        if isinstance(leaf, Mapping):
            filled[name] = with_values(leaf, values, below)
        elif not isinstance(leaf, torch.Tensor):
            filled[name] = _of_the_same_kind(values[below], leaf)
    return filled


def is_json(value: object) -> bool:
    """Whether `value` survives JSON; a tuple does, as a list."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_json(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_json, value))
    return value is None or type(value) in (bool, int, float, str)


def _leaves(tree: Mapping[Any, Any], key: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        below = f"{key}.{name}" if key else str(name)
        if isinstance(value, Mapping):
            yield from _leaves(value, below)
        else:
            yield below, value


def _of_the_same_kind(value: Any, present: object) -> Any:
    """JSON has no tuples: a list becomes one where the object has one now (`random.getstate`, Adam's betas)."""
    if isinstance(value, list) and isinstance(present, (list, tuple)):
        partners = list(present) + [None] * len(value)
        items = [_of_the_same_kind(*pair) for pair in zip(value, partners, strict=False)]
        return tuple(items) if isinstance(present, tuple) else items
    if isinstance(value, dict) and isinstance(present, Mapping):
        return {key: _of_the_same_kind(item, present.get(key)) for key, item in value.items()}
    return value


def _described(leaf: object) -> str:
    kind = type(leaf).__name__
    if isinstance(leaf, (list, tuple, Mapping)):
        return f"a {kind} that holds more than JSON values"
    return f"of type {kind}"
