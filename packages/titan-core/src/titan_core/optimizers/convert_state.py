"""Loading an optimizer's state that was saved in another format: the one way to change it in the middle of a run."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from titan_core.config import StateDtype
from titan_core.optim import OptimizerState
from titan_core.optimizers.adamw import row_runs
from titan_core.optimizers.blocks import as_rows
from titan_core.optimizers.moments import MomentStore
from titan_core.optimizers.muon import momentum_dtype


class ConvertedState:
    """Looks like the `OptimizerState` that was saved with `saved`, and converts what is loaded to `now`.

    Moments change by what the format `now` rounds away, and are the same on every layout. Use it once, for loading:
    until then it holds a second state.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, *, saved: StateDtype, now: StateDtype) -> None:
        """`now`: the `state_dtype` that `optimizer` was built with."""
        self._optimizer, self._model = optimizer, model
        self._saved_dtype: StateDtype = saved
        self._saved, self._now = MomentStore(saved), MomentStore(now)
        self._loaded: dict[nn.Parameter, dict[str, Tensor]] = {}

    def state_dict(self) -> dict[str, Tensor]:
        """`<FQN>.<state name>` -> tensor, as it was saved."""
        OptimizerState(self._optimizer, self._model).state_dict()  # creates what does not exist yet
        if not self._loaded:
            self._loaded = {parameter: self._as_saved(parameter, own) for _, parameter, own in self._states()}
        return {
            f"{fqn}.{name}": tensor
            for fqn, parameter, _ in self._states()
            for name, tensor in self._loaded[parameter].items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies `state` into the optimizer's tensors, converted."""
        for key, tensor in self.state_dict().items():
            if tensor is not state[key]:
                tensor.copy_(state[key])
        for _, parameter, own in self._states():
            loaded = self._loaded.pop(parameter)
            if "momentum" in own:
                own["momentum"].copy_(loaded["momentum"])
                continue
            own["step"].copy_(loaded["step"])
            before, after = self._saved.moments_of(parameter), self._now.moments_of(parameter)
            for rows in row_runs(parameter, len(as_rows(parameter))):
                after.write(own, rows, *before.read(loaded, rows), None)

    def _states(self) -> list[tuple[str, nn.Parameter, dict[str, Tensor]]]:
        named = self._model.named_parameters()
        return [(fqn, p, self._optimizer.state[p]) for fqn, p in named if p in self._optimizer.state]

    def _as_saved(self, parameter: nn.Parameter, own: dict[str, Tensor]) -> dict[str, Tensor]:
        if "momentum" in own:
            return {"momentum": torch.zeros_like(parameter, dtype=momentum_dtype(parameter, self._saved_dtype))}
        return {"step": torch.zeros_like(own["step"])} | self._saved.moments_of(parameter).create()
