"""Attention of a block of queries to a block of keys, in the two parts that a ring needs.

The forward returns the log-sum-exp of the scores beside the result, so that results for different keys can be merged;
the backward takes the result and log-sum-exp over *all* keys and gives this block's share of the gradients. Source:
FlashAttention-2, arXiv 2307.08691, section 3.1.

Kernels, best first: on a CPU its own flash kernel, for every mask and dtype (2 to 3 times as fast as plain PyTorch); on
a GPU flash attention, for half precision without a mask; else plain PyTorch, which computes some queries at a time so
that scores take bounded memory. The plain path is right everywhere and slow on a GPU: it computes in float32.

Dimensions: B batch, N query heads, K key heads (N is a multiple of K), Q queries, T keys, H head dim.
"""

import torch
from torch import Tensor

from titan_core.compat import (
    cpu_flash_attention,
    cpu_flash_attention_backward,
    cuda_flash_attention,
    cuda_flash_attention_backward,
)

_TILE_ELEMENTS = 2**25  # scores that exist at once on the plain path: 128 MiB in float32


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attends from `q` [B, N, Q, H] to `k`, `v` [B, K, T, H]; the scale is 1 / sqrt(H).

    `mask` [B, Q, T] bool: which query may see which key. `causal`: beside that, query i sees keys up to i (Q = T).

    Returns the result [B, N, Q, H], in the input's dtype or wider, and the log-sum-exp of the scores [B, N, Q] in at
    least float32. A query that sees no key has the result 0 and the log-sum-exp -inf.
    """
    if q.device.type == "cpu":
        allowed = _allowed(q, mask, causal=causal)
        out, lse = cpu_flash_attention(q, k, v, _bias(allowed, q.dtype), causal=causal and allowed is None)
        return out, lse if allowed is None else _empty_rows_to_minus_infinity(lse, allowed)
    if _gpu_flash_fits(q, mask):
        return cuda_flash_attention(q, k, v, causal=causal)
    return plain_attention(q, k, v, mask, causal=causal)


def block_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's share of the gradients of q, k and v: shaped like them, in their dtype or wider.

    `grad_out` and `out` [B, N, Q, H], in the dtype of `q`, and `lse` [B, N, Q] belong to attention over all keys;
    the rest is what `block_attention` was called with.
    """
    if q.device.type == "cpu":
        allowed = _allowed(q, mask, causal=causal)
        return cpu_flash_attention_backward(
            grad_out, q, k, v, out, _finite(lse), _bias(allowed, q.dtype), causal=causal and allowed is None
        )
    if _gpu_flash_fits(q, mask):
        return cuda_flash_attention_backward(grad_out, q, k, v, out, lse, causal=causal)
    return plain_attention_backward(grad_out, q, k, v, out, lse, mask, causal=causal)


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merges attention to more keys into `out` [.., H] and `lse` [..], in place; both in at least float32."""
    total = torch.logaddexp(lse, block_lse)
    reference = _finite(total)
    out.mul_((lse - reference).exp_()[..., None]).add_(block_out * (block_lse - reference).exp_()[..., None])
    lse.copy_(total)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """`block_attention` in plain PyTorch, on any device; both results are in at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = k.to(wide), v.to(wide)
    out, lse = q.new_empty(q.shape, dtype=wide), q.new_empty(q.shape[:-1], dtype=wide)
    for rows in _tiles(q, k):
        scores = _scores(q[:, :, rows].to(wide), k, mask, rows, causal=causal)
        tile_lse = scores.logsumexp(-1)
        weights = (scores - _finite(tile_lse)[..., None]).exp_()
        out[:, :, rows] = _ungrouped(_grouped(weights, k) @ v, q)
        lse[:, :, rows] = tile_lse
    return out, lse


def plain_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`block_attention_backward` in plain PyTorch, on any device; gradients are in at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5
    k, v = k.to(wide), v.to(wide)
    grad_q, grad_k, grad_v = q.new_empty(q.shape, dtype=wide), torch.zeros_like(k), torch.zeros_like(v)
    for rows in _tiles(q, k):
        tile_q, tile_grad = q[:, :, rows].to(wide), grad_out[:, :, rows].to(wide)
        scores = _scores(tile_q, k, mask, rows, causal=causal)
        weights = _grouped((scores - _finite(lse[:, :, rows])[..., None]).exp_(), k)
        # Softmax normalises over all keys; out stands for those that are not in this block.
        correction = (tile_grad * out[:, :, rows]).sum(-1, keepdim=True)
        grouped_grad = _grouped(tile_grad, k)
        grad_scores = weights * (grouped_grad @ v.mT - _grouped(correction, k)) * scale
        grad_q[:, :, rows] = _ungrouped(grad_scores @ k, q)
        grad_k += grad_scores.mT @ _grouped(tile_q, k)
        grad_v += weights.mT @ grouped_grad
    return grad_q, grad_k, grad_v


def _tiles(q: Tensor, k: Tensor) -> list[slice]:
    rows = max(1, _TILE_ELEMENTS // (q.shape[0] * q.shape[1] * k.shape[2]))
    return [slice(start, min(start + rows, q.shape[2])) for start in range(0, q.shape[2], rows)]


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, rows: slice, *, causal: bool) -> Tensor:
    """Scaled scores [B, N, rows, T] of the queries `rows`, -inf where a key is invisible."""
    scores = _ungrouped(_grouped(q * q.shape[-1] ** -0.5, k) @ k.mT, q)
    # Not in place: selective recomputation may keep the product, and refuses one that was changed.
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, rows], -torch.inf)
    if causal:
        queries = torch.arange(rows.start, rows.stop, device=q.device)
        scores = scores.masked_fill(queries[:, None] < torch.arange(k.shape[2], device=q.device), -torch.inf)
    return scores


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """[B, N, Q, *] -> [B, K, N / K x Q, *]: the query heads of one key head follow each other, and share its matmul."""
    return x.reshape(k.shape[0], k.shape[1], -1, x.shape[-1])


def _ungrouped(x: Tensor, q: Tensor) -> Tensor:
    """Undoes `_grouped`; heads are those of `q` [B, N, ..]."""
    return x.reshape(q.shape[0], q.shape[1], -1, x.shape[-1])


def _finite(lse: Tensor) -> Tensor:
    """`lse` with 0 for -inf, so that subtracting it from -inf gives no NaN."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _allowed(q: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor | None:
    """The mask with the causal order in it; None if there is none, since kernels know the causal order themselves."""
    return mask.tril() if mask is not None and causal else mask


def _bias(allowed: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores [B, 1, Q, T]: the CPU's kernel takes no bool mask."""
    if allowed is None:
        return None
    bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return bias.masked_fill_(~allowed, -torch.inf)[:, None]


def _empty_rows_to_minus_infinity(lse: Tensor, allowed: Tensor) -> Tensor:
    # The CPU's kernel leaves 0, which merging would take for a key with score 0.
    return lse.masked_fill(~allowed.any(-1)[:, None], -torch.inf)


def _gpu_flash_fits(q: Tensor, mask: Tensor | None) -> bool:
    return (
        q.device.type == "cuda"
        and mask is None
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )
