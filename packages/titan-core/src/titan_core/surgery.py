"""Changing what a module does without changing its name, its parameters' names or its code.

A module's class is replaced by a subclass of it. Equal modules that are changed in the same way share the subclass, so
that a compiler which knows one block knows all of them.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from titan_core.shards import is_dtensor

_SUBCLASSES: dict[tuple[Any, ...], type[nn.Module]] = {}


def specialise(module: nn.Module, key: tuple[Any, ...], members: Callable[[type[nn.Module]], dict[str, Any]]) -> None:
    """Gives `module` the class `type(module)` extended by `members(type(module))`.

    `key` says what the members do: with the same class and key the first subclass is used again.
    """
    base = type(module)
    if (base, *key) not in _SUBCLASSES:
        _SUBCLASSES[base, *key] = type(base.__name__, (base,), {"__module__": base.__module__, **members(base)})
    module.__class__ = _SUBCLASSES[base, *key]


def local_parameter(name: str, through: Callable[[Tensor], Tensor | None] | None = None) -> Any:
    """A class member that reads the parameter `name` as this rank's plain tensor, passed `through` a function.

    The parameter itself stays where it is: `named_parameters` and state dicts see it as before. FSDP reads the
    attribute too and gets what it put there, unless that is gathered: then it lies on one axis of the mesh only.
    """

    def get(module: nn.Module) -> Tensor | None:
        parameter = module._parameters[name]
        if parameter is None or not is_dtensor(parameter) or parameter.device_mesh.ndim > 1:
            return parameter
        tensor = parameter.to_local()
        return tensor if through is None else through(tensor)

    return property(get)
