"""A feed-forward layer of which each token passes only a few parts: a mixture of experts that drops no token."""

from typing import Any

import torch
from torch import Tensor, nn

from titan_models.experts import Experts
from titan_models.feed_forward import FeedForward
from titan_models.router import Router
from titan_models.shape import MoEConfig


class MoE(nn.Module):
    """Hands each token to the k experts that its router chooses, and sums their outputs by the router's weights."""

    def __init__(self, dim: int, config: MoEConfig) -> None:
        super().__init__()
        self.router = Router(dim, config)
        self.experts = Experts(dim, config.hidden_dim, config.experts, config.grouped_mm)
        self.shared = FeedForward(dim, config.shared_hidden_dim) if config.shared_hidden_dim else None

    def forward(self, x: Tensor, row_weights: Tensor | None = None) -> Tensor:
        """`x` [B, S, D] -> [B, S, D]; `row_weights` [B] as for `Router`."""
        weights, chosen, counts = self.router(x, row_weights)
        top_k = chosen.shape[-1]
        order = chosen.flatten().argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        outputs = self.experts(_Copies.apply(x.flatten(0, 1), order, inverse, top_k), counts)
        by_token = _Copies.apply(outputs, inverse, order, 1).unflatten(0, (-1, top_k))
        mixed = torch.bmm(weights.to(x.dtype).view(-1, 1, top_k), by_token).view_as(x)
        return mixed if self.shared is None else mixed + self.shared(x)


class _Copies(torch.autograd.Function):
    """Copies each row of `x` [T, D] `copies` times and puts the T * copies rows into `order`.

    The backward sums copies in a fixed order, where that of indexing would add them up as they come.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[order // copies]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = grad_outputs[0][inverse]
        return grad if ctx.copies == 1 else grad.unflatten(0, (-1, ctx.copies)).sum(1), None, None, None
