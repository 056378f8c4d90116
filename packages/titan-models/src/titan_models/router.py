"""The router of a mixture of experts: which experts a token is handed to, and how the load is kept even.

Auxiliary losses are defined for each row of the batch, over all of its tokens, and never become a part of the model's
output. Their gradient enters by an autograd node on the logits, so that a pipeline stage needs no second output, and it
is not scaled by what the caller divides the main loss by. What is added to the *mean* loss is

    sum over rows b of row_weights[b] * (balance_loss * L_b + z_loss * Z_b)
    L_b = sum over e of f_be * P_be      f_be = E / (k S) * tokens of row b that chose e,  P_be = their mean share of e
    Z_b = mean over tokens of logsumexp(logits)^2

(L: DeepSeek-V3, arXiv 2412.19437, eq. 17-20; Z: ST-MoE, arXiv 2202.08906, eq. 5). The same node counts the load in its
backward, which runs once even where activations are computed twice.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_models.shape import MoEConfig


class Router(nn.Module):
    """Scores all experts for each token and chooses the best k.

    Logits and scores are computed in at least float32: in bfloat16 experts would tie. `load` [E] int64 holds the tokens
    that this device handed to each expert in training steps, until someone sets it to zero; `bias` [E], which exists
    with a `bias_update_rate`, is added to the scores for the choice only.
    """

    load: Tensor
    bias: Tensor | None

    def __init__(self, dim: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Gate(dim, config.experts, bias=False)
        self.register_buffer("load", torch.zeros(config.experts, dtype=torch.int64), persistent=False)
        self.register_buffer(
            "bias", torch.zeros(config.experts, dtype=torch.float32) if config.bias_update_rate else None
        )
        self.sum_over_sequence: Callable[[Tensor], Tensor] = _identity
        """Sums counts, in place or not, over the devices that hold the other tokens of the same rows."""

    def forward(self, x: Tensor, row_weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [B, S, k] of the outputs, experts [B, S, k] int64, and tokens of each expert [E] int64.

        `x`: hidden states [B, S, D]. `row_weights` [B]: the shares of the rows in the mean loss, 0 for padding, which
        is not counted as load; None: 1 / B each.
        """
        logits = self.gate(x)
        with torch.no_grad():
            chosen = self._choose(self._score(logits))
            row_counts = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, chosen, True).sum(1)
        if self.training and logits.requires_grad:
            logits = self._account(logits, row_counts, row_weights)
        weights = self._score(logits).gather(-1, chosen)
        if self.config.normalize_weights:
            # All k sigmoids may be too small for a number.
            weights = weights / (weights.sum(-1, keepdim=True) + torch.finfo(weights.dtype).tiny)
        return weights * self.config.route_scale, chosen, row_counts.sum(0)

    def finish_step(self, load: Tensor) -> None:
        """Moves the bias by the `load` [E] of a whole step: tokens to each expert, summed over all devices."""
        if self.bias is not None:
            self.bias += self.config.bias_update_rate * torch.sign(load.sum() - load * load.numel())

    def _score(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.config.score == "sigmoid" else logits.softmax(-1)

    def _choose(self, scores: Tensor) -> Tensor:
        """The best k experts of each token by `scores` [B, S, E], within its best groups: [B, S, k] int64."""
        if self.bias is not None:
            scores = scores + self.bias
        if self.config.top_groups < self.config.groups:
            groups = scores.unflatten(-1, (self.config.groups, -1))
            best = groups.topk(2).values.sum(-1).topk(self.config.top_groups).indices
            outside = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, False)
            scores = groups.masked_fill(outside[..., None], -torch.inf).flatten(-2)
        return scores.topk(self.config.top_k).indices

    @torch.no_grad()
    def _gradient(self, logits: Tensor, row_counts: Tensor, row_weights: Tensor) -> Tensor | None:
        if not (self.config.balance_loss or self.config.z_loss):
            return None
        return auxiliary_gradient(logits, self.sum_over_sequence(row_counts.clone()), row_weights, self.config)

    def _account(self, logits: Tensor, row_counts: Tensor, row_weights: Tensor | None) -> Tensor:
        """`logits`, with the node that adds the gradient of the auxiliary losses and counts the load."""
        if row_weights is None:
            row_weights = logits.new_full(logits.shape[:1], 1 / logits.shape[0])
        load = (row_counts * (row_weights != 0)[:, None]).sum(0)
        return _Account.apply(logits, self._gradient(logits, row_counts, row_weights), load, self.load)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        # The bias moves in small equal steps; 256 of them away from zero, bfloat16 could not tell the next one. So a
        # cast of the model to a narrow dtype moves it to the device only.
        before = self.bias
        super()._apply(fn, recurse)
        if before is not None and self.bias is not None and self.bias.dtype.itemsize < torch.float32.itemsize:
            self.bias = before.to(self.bias.device)
        return self


class Gate(nn.Linear):
    """A linear layer that computes in at least float32, whatever the dtype of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` [..., D] -> [..., E]."""
        wide = torch.promote_types(input.dtype, torch.float32)
        return F.linear(input.to(wide), self.weight.to(wide))


def auxiliary_gradient(logits: Tensor, row_counts: Tensor, row_weights: Tensor, config: MoEConfig) -> Tensor:
    """Gradient [B, S, E] of the auxiliary losses (see the module) with respect to `logits` [B, S, E].

    `row_counts` [B, E]: tokens of the whole row, of which `logits` may hold a part, that chose each expert.
    """
    tokens = row_counts.sum(-1, keepdim=True) / config.top_k  # S of the whole row
    shares = logits.softmax(-1)
    gradient = 2 * config.z_loss * logits.logsumexp(-1, keepdim=True) * shares
    if config.balance_loss:
        frequency = (row_counts.shape[-1] / config.top_k * row_counts / tokens)[:, None].to(logits.dtype)
        slope: Tensor | float = 1.0
        if config.score == "sigmoid":
            scores = logits.sigmoid()
            shares, slope = scores / scores.sum(-1, keepdim=True), 1 - scores
        excess = frequency - (shares * frequency).sum(-1, keepdim=True)
        gradient = gradient + config.balance_loss * shares * slope * excess
    return gradient * (row_weights[:, None] / tokens)[..., None].to(logits.dtype)


class _Account(torch.autograd.Function):
    """The identity; its backward adds `gradient` to that of its input and `load` [E] to `total` [E]."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, gradient: Tensor | None, load: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(gradient, load)
        # Not saved: other micro-batches change it between this forward and its backward.
        ctx.total = total
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, load = ctx.saved_tensors
        ctx.total.add_(load)
        return grad_outputs[0] if gradient is None else grad_outputs[0] + gradient, None, None, None


def _identity(counts: Tensor) -> Tensor:
    return counts
