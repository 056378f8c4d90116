"""Root-mean-square normalisation."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Scales each vector to unit root mean square, then by a learnt weight (arXiv 1910.07467, eq. 4).

    The mean is taken in at least float32, whatever the dtype of the input; the weight multiplies after the
    result has been rounded back, as the published Llama checkpoints were trained.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., D] -> [..., D], same dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight
