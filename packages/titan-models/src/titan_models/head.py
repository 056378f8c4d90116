"""The last layer: logits, or directly the loss, without the logits of all tokens in memory at one time."""

from typing import Any

import torch
from torch import Tensor, nn

from titan_models.facts import CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS

IGNORED = -100  # the label of a token that carries no loss, as in torch.nn.functional.cross_entropy


class Head(nn.Module):
    """A linear layer onto the vocabulary that can compute the cross-entropy itself."""

    def __init__(self, dim: int, vocab_size: int, chunk_tokens: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        self.chunk_tokens = chunk_tokens

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [B, S, V] of `hidden` [B, S, D]; with `labels` [B, S] int64 the summed loss instead.

        The loss is a scalar in at least float32: the sum over tokens whose label is not -100. Divide it by the
        number of such tokens in the global batch.
        """
        if labels is None:
            return hidden @ self.weight.T
        chunk = self.chunk_tokens or (CPU_CHUNK_TOKENS if hidden.device.type == "cpu" else GPU_CHUNK_TOKENS)
        # Gradients are computed in the forward pass, unless nobody will ask for them.
        weight = self.weight
        if not torch.is_grad_enabled():
            hidden, weight = hidden.detach(), weight.detach()
        return _ChunkedCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten(), chunk)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy that computes its gradients in the forward pass, one chunk of tokens at a time.

    The gradient of a softmax needs the logits once more. Computing it while they are at hand costs the same
    three matrix products as the usual way and stores a [T, D] gradient where the usual way stores [T, V] logits.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Chunks rounded to bfloat16 one by one would lose what a single product keeps.
        sum_dtype = weight.dtype if hidden.shape[0] <= chunk_tokens else wide
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if needs_weight else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            loss_rows, grad_logits = _cross_entropy(hidden[rows] @ weight.T, labels[rows], wide)
            loss += loss_rows
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if grad_weight is not None and sum_dtype == weight.dtype:
                grad_weight.addmm_(grad_logits.T, hidden[rows])
            elif grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.scale = None
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # In place: the gradients belong to this call alone, and a copy of a vocabulary's weights is large. A pipeline
        # that computes gradients of weights apart comes here twice; what is scaled already is scaled by the ratio.
        (scale,) = grad_outputs
        factor = scale if ctx.scale is None else torch.where(scale == ctx.scale, 1.0, scale / ctx.scale)
        ctx.scale = scale
        for grad in ctx.saved_tensors:
            if grad is not None:
                grad.data.mul_(factor)  # through .data, since autograd would refuse what was changed at a second visit
        return *ctx.saved_tensors, None, None


def _cross_entropy(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The summed loss of `logits` [T, V], and its gradient, softmax minus one-hot, rounded once from `dtype`."""
    counts = labels != IGNORED
    index = labels.where(counts, 0)[:, None]
    log_probabilities = logits.to(dtype).log_softmax(-1)
    loss = -(log_probabilities.gather(1, index)[:, 0] * counts).sum()
    grad = log_probabilities.exp_()
    grad.scatter_add_(1, index, grad.new_full((), -1.0).expand_as(index))
    return loss, grad.mul_(counts[:, None]).to(logits.dtype)
