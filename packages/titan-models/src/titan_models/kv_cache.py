"""Keys and values of the tokens that a model has seen, so that each further token costs one step and not a whole text.

A row's token at position p has place p in the cache. Rows may be of different lengths: what stands at places beyond a
row's last token, padding of a batch of prompts say, is overwritten by the tokens that come to these positions, and
nothing sees it before, since a token sees no later position.
"""

import torch
from torch import Tensor


class LayerCache:
    """What one layer of attention keeps, for as many heads as it has on this device."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keeps `k`, `v` [B, S, K, H] of the tokens at `positions` [B, S]; returns all that is kept, with a mask.

        Returns keys and values [B, T, K, H], and which of these T tokens each of the S may see: [B, 1, S, T] bool.
        """
        if self._keys is None or self._values is None:
            self._keys, self._values = (x.new_zeros(x.shape[0], self._capacity, *x.shape[2:]) for x in (k, v))
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self._keys[rows, positions], self._values[rows, positions] = k, v
        places = torch.arange(self._capacity, device=k.device)
        return self._keys, self._values, (places <= positions[:, :, None])[:, None]


class KVCache:
    """The caches of all layers.

    Args:
        capacity: T: tokens of a row, those that are generated included.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._layers: dict[str, LayerCache] = {}

    def layer(self, name: str) -> LayerCache:
        """That of a layer, by its name in the model."""
        return self._layers.setdefault(name, LayerCache(self._capacity))
