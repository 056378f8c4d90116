"""Whether a step may move parameters, decided on the device from numbers that all ranks share.

What is not finite never may, nor may a loss far above the last ones, which a bad batch or a step too large has made.
The verdict is a tensor that an optimizer heeds (see `step_unless`), so that the host waits for nothing.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from titan_core.config import GuardConfig


class LossGuard:
    """Remembers the last good losses; `Stateful` for checkpoints."""

    def __init__(self, config: GuardConfig, device: torch.device) -> None:
        self._sigma = config.sigma
        wide = torch.float32 if device.type == "mps" else torch.float64
        self._losses = torch.zeros(config.window if config.sigma else 0, dtype=wide, device=device)
        self._good = torch.zeros((), dtype=torch.int64, device=device)
        self.limit = torch.full((), torch.inf, dtype=wide, device=device)
        """Above what the loss that was judged last would have been a spike; infinite if nothing was."""

    @torch.no_grad()
    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1.0 if the step must not move parameters, else 0.0: a float32 scalar on their device.

        `loss`: the mean over the global batch; `grad_norm`: the global norm. Scalars that are the same on all ranks.
        Good losses are remembered.
        """
        bad = ~(loss.isfinite() & grad_norm.isfinite())
        if self._sigma:
            loss = loss.to(self._losses.dtype)
            limit = self._losses.mean() + self._sigma * self._losses.std()
            self.limit = torch.where(self._good >= len(self._losses), limit, torch.inf)
            bad |= loss > self.limit
            place = (self._good % len(self._losses))[None]
            self._losses.index_copy_(0, place, torch.where(bad, self._losses[place], loss))
        self._good += ~bad
        return bad.to(torch.float32)

    def state_dict(self) -> dict[str, Tensor]:
        """`losses`: the last ones [window], and how many were `good` so far: int64."""
        return {"losses": self._losses, "good": self._good}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies `state` into the guard's tensors."""
        for name, own in self.state_dict().items():
            own.copy_(state[name])
