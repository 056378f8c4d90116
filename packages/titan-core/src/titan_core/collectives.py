"""Differentiable collectives: what passes between ranks in forward, and the gradient of it in backward.

Each comes as a pair of opposites. The loss is a sum over ranks, so where a forward copies a value to several ranks, the
backward sums their gradients. All results are real tensors: a lazily awaited one that reaches a compiled region loses
its gradient without a word (torch 2.13), so every call waits for its result.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from titan_core.compat import (
    functional_all_gather,
    functional_all_reduce,
    functional_all_to_all,
    functional_reduce_scatter,
)


def gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Concatenates the ranks' parts along `dim`; its backward hands each rank the summed gradient of its own part."""
    return _Gather.apply(x, dim, group)


def gather_same(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Concatenates the ranks' parts along `dim`; its backward keeps this rank's part of a gradient that all share."""
    return _GatherSame.apply(x, dim, group)


def scatter_sum(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Sums over the ranks and keeps this rank's part along `dim`; its backward gathers."""
    return _ScatterSum.apply(x, dim, group)


def sum_forward(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sums over the ranks; its backward passes the gradient, which is the same on all of them, on as it is."""
    return _SumForward.apply(x, group)


def sum_backward(x: Tensor, group: ProcessGroup) -> Tensor:
    """`x` itself, the same on all ranks; its backward sums the ranks' gradients."""
    return _SumBackward.apply(x, group)


def all_to_all(x: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
    """Sends `sent[i]` rows of `x` to rank i and receives `received[i]` rows from it; its backward sends them back."""
    return _AllToAll.apply(x, received, sent, group)


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """`x[order]` for a permutation of rows and its `inverse`; its backward is a look-up too, not a sum."""
    return _Permute.apply(x, order, inverse)


def all_gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Concatenates the ranks' parts along `dim`, without a gradient."""
    whole = functional_all_gather(x.contiguous(), group)
    return whole if dim == 0 else torch.cat(whole.chunk(group.size()), dim)


def reduce_scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Sums over the ranks and keeps this rank's part along `dim`, without a gradient."""
    if dim != 0:
        x = torch.cat(x.chunk(group.size(), dim))
    return functional_reduce_scatter(x.contiguous(), group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(grad_outputs[0], ctx.dim, ctx.group), None, None


class _GatherSame(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.size, ctx.rank = dim, group.size(), group.rank()
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return grad_outputs[0].chunk(ctx.size, ctx.dim)[ctx.rank], None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad_outputs[0], ctx.dim, ctx.group), None, None


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return functional_all_reduce(x.contiguous(), group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return functional_all_reduce(grad_outputs[0].contiguous(), ctx.group), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return functional_all_to_all(x.contiguous(), received, sent, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        grad = functional_all_to_all(grad_outputs[0].contiguous(), ctx.sent, ctx.received, ctx.group)
        return grad, None, None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return grad_outputs[0][ctx.saved_tensors[1]], None, None
