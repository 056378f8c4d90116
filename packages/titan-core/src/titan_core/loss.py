"""Cross-entropy over a vocabulary that is cut over the ranks of a group, in chunks of tokens.

No rank ever holds the logits of all tokens, nor those of the whole vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from titan_core.collectives import all_gather, gather_same

IGNORED = -100  # the label of a token that carries no loss, as in torch.nn.functional.cross_entropy


def vocabulary_parallel_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, first_row: int, chunk_tokens: int | None, group: ProcessGroup
) -> Tensor:
    """The summed cross-entropy of `hidden` [B, S, D] against `labels` [B, S] int64, the same on all ranks of `group`.

    `weight` [V / ranks, D] are this rank's rows of the vocabulary, the first of which is `first_row`. The gradient of
    `hidden` is this rank's share of it: sum it over the group.
    """
    chunk = chunk_tokens or (256 if hidden.device.type == "cpu" else 2048)
    # Gradients are computed in the forward pass, unless nobody will ask for them.
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    return _VocabularyParallelLoss.apply(hidden.flatten(0, -2), weight, labels.flatten(), first_row, chunk, group)


def vocabulary_parallel_logits(hidden: Tensor, weight: Tensor, vocab_size: int, group: ProcessGroup) -> Tensor:
    """Logits [B, S, V] of `hidden` [B, S, D], whole on every rank of `group`."""
    rows = -(-vocab_size // group.size())  # as torch cuts: the last ranks may have fewer
    logits = F.pad(hidden @ weight.T, (0, rows - weight.shape[0]))
    return gather_same(logits, logits.dim() - 1, group)[..., :vocab_size]


class _VocabularyParallelLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, first_row: int, chunk_tokens: int, group: ProcessGroup
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            loss_rows, grad_logits = _cross_entropy(hidden[rows] @ weight.T, labels[rows], first_row, wide, group)
            loss += loss_rows
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grads = (None if grad is None else grad * grad_outputs[0] for grad in (grad_hidden, grad_weight))
        return *grads, None, None, None, None


def _cross_entropy(
    logits: Tensor, labels: Tensor, first_row: int, dtype: torch.dtype, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The summed loss over the whole vocabulary, and its gradient for this rank's `logits` [T, V / ranks]."""
    counts = labels != IGNORED
    index = labels - first_row
    inside = counts & (index >= 0) & (index < logits.shape[1])
    index = index.where(inside, 0)[:, None]
    wide = logits.to(dtype)
    # One exchange a chunk: each rank's greatest logit, its sum of exponentials, and the label's logit if it has it.
    greatest = wide.amax(1)
    exponentials = (wide - greatest[:, None]).exp_()
    label = wide.gather(1, index)[:, 0] * inside
    own = torch.stack((greatest, exponentials.sum(1), label))
    greatests, sums, labels_logits = all_gather(own[None], 0, group).unbind(1)
    overall = greatests.amax(0)
    total = (sums * (greatests - overall).exp()).sum(0)
    loss = ((overall + total.log() - labels_logits.sum(0)) * counts).sum()
    grad = exponentials * ((greatest - overall).exp() / total)[:, None]
    grad.scatter_add_(1, index, -inside.to(dtype)[:, None])
    return loss, grad.mul_(counts[:, None]).to(logits.dtype)
