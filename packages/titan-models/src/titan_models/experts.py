"""Many feed-forward layers whose weights are stacked, each applied to its own run of tokens.

There are two ways to the same results: torch's grouped product, one kernel for all experts, and products expert by
expert. The second takes every dtype and shape, but on a GPU the host waits for the counts. It is an operator of its
own, so that compilers and fake tensors, which know no counts, see one call with known shapes.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Experts(nn.Module):
    """E SwiGLU layers (see `titan_models.feed_forward`) in three tensors: `w1`, `w3` [E, F, D] and `w2` [E, D, F].

    How many experts there are is read from the weights: a module that holds a part of them works as it is.
    """

    def __init__(
        self, dim: int, hidden_dim: int, experts: int, grouped_mm: Literal["auto", "grouped", "loop"] = "auto"
    ) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(experts, hidden_dim, dim))
        self.w3 = nn.Parameter(torch.empty(experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(experts, dim, hidden_dim))
        self.grouped_mm = grouped_mm

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """`x` [T, D] sorted by expert, the first `counts[0]` rows for the first expert and so on -> [T, D].

        `counts` [E] int64 sum to T; each may be 0.

        Raises:
            ValueError: if `grouped_mm` is "grouped" and torch's grouped product does not take these weights.
        """
        hidden = F.silu(self.grouped_product(x, self.w1, counts)) * self.grouped_product(x, self.w3, counts)
        return self.grouped_product(hidden, self.w2, counts)

    def grouped_product(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """Multiplies each expert's rows of `x` [T, K] with its `weight` [E, N, K] -> [T, N]; may be replaced."""
        if self._grouped(weight):
            return F.grouped_mm(x, weight.transpose(-2, -1), offs=counts.cumsum(0).to(torch.int32))
        return expert_products(x, weight, counts)

    def _grouped(self, weight: Tensor) -> bool:
        aligned = all(size * weight.dtype.itemsize % 16 == 0 for size in weight.shape[1:])
        if self.grouped_mm == "grouped" and (weight.dtype == torch.float64 or not aligned):
            raise ValueError(
                f"model.moe.grouped_mm is 'grouped', but the weights of an expert are {tuple(weight.shape[1:])} "
                f"numbers of {weight.dtype}: torch's grouped product takes no float64 and only widths that are "
                "multiples of 16 bytes. Use 'auto' or 'loop'."
            )
        # Only for bfloat16 has torch 2.13 a kernel on GPUs, and shapes for compilers. On a CPU the two ways are equally
        # fast.
        return self.grouped_mm == "grouped" or (
            self.grouped_mm == "auto" and weight.dtype == torch.bfloat16 and aligned
        )


@torch.library.custom_op("titan_models::expert_products", mutates_args=())
def expert_products(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiplies each expert's rows of `x` [T, K] with its `weight` [E, N, K] -> [T, N]; `counts` as for `Experts`."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    sizes = counts.tolist()
    for rows, products, own in zip(x.split(sizes), out.split(sizes), weight, strict=True):
        torch.mm(rows, own.T, out=products)
    return out


@torch.library.custom_op("titan_models::expert_weight_gradients", mutates_args=())
def expert_weight_gradients(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """Gradient [E, N, K] of the weights from that of the products, `grad` [T, N], and their input `x` [T, K]."""
    out = x.new_empty(counts.shape[0], grad.shape[1], x.shape[1])
    sizes = counts.tolist()
    for own, rows, grad_rows in zip(out, x.split(sizes), grad.split(sizes), strict=True):
        torch.mm(grad_rows.T, rows, out=own)
    return out


@expert_products.register_fake
def _products_shape(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@expert_weight_gradients.register_fake
def _weight_gradients_shape(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], grad.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, counts = ctx.saved_tensors
    needs_x, needs_weight, _ = ctx.needs_input_grad
    grad_x = expert_products(grad, weight.transpose(1, 2), counts) if needs_x else None
    return grad_x, expert_weight_gradients(grad, x, counts) if needs_weight else None, None


expert_products.register_autograd(_backward, setup_context=_keep)
