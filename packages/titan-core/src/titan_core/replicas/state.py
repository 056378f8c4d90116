"""What a rank sends to the same rank of another group, so that it is where this one is: its part of everything.

Groups have the same layout, so local parts fit as they are, and nothing is gathered. What is nested lies in mappings.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from titan_core.shards import local


class Stateful(Protocol):
    """Anything whose state can be taken and put back, as checkpoints do."""

    def state_dict(self) -> dict[str, Any]:
        """The state, by name."""
        ...

    def load_state_dict(self, state_dict: Any) -> None:
        """Puts a state back."""
        ...


def local_state(state: Mapping[str, Stateful]) -> dict[str, Any]:
    """This rank's part of all states, without copying: a plain tensor for each DTensor."""
    return {name: _local_parts(part.state_dict()) for name, part in state.items()}


@torch.no_grad()
def load_local_state(state: Mapping[str, Stateful], received: Mapping[str, Any]) -> None:
    """Puts what the same rank of another group has sent into all states; tensors keep their place and device."""
    for name, part in state.items():
        part.load_state_dict(_filled(part.state_dict(), received[name]))


def _local_parts(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _local_parts(below) for key, below in value.items()}
    return local(value).detach() if isinstance(value, Tensor) else value


def _filled(own: Any, received: Any) -> Any:
    if isinstance(own, Mapping) and isinstance(received, Mapping):
        return {key: _filled(own.get(key), below) for key, below in received.items()}
    if isinstance(own, Tensor):
        local(own).copy_(received)
        return own
    return received
