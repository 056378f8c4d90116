"""The states of the global random generators, for user code that draws from them.

Titan's own draws are functions of (seed, step, name, index) and never touch these.
"""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


class RngState:
    """This process's generators: Python's, NumPy's, torch's on the CPU and on the current GPU."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values."""
        version, words, gauss = random.getstate()
        mersenne = np.random.get_state(legacy=False)
        state: dict[str, Any] = {
            "python": [version, list(words), gauss],
            "numpy": mersenne | {"state": mersenne["state"] | {"key": mersenne["state"]["key"].tolist()}},
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned; a GPU's state is left out where there is none."""
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        inner = state["numpy"]["state"]
        np.random.set_state(state["numpy"] | {"state": inner | {"key": np.array(inner["key"], dtype=np.uint32)}})
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
