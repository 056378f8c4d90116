"""The gated feed-forward layer."""

import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """SwiGLU: `w2(silu(w1 x) * w3 x)` (arXiv 2002.05202, sec. 2)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., D] -> [..., D]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
