"""Causal attention confined to documents, by whichever kernel: one function, equal results.

    sdpa     scaled_dot_product_attention with a mask of all pairs of tokens: any device and dtype
    flex     flex_attention with a block mask, compiled: skips blocks of pairs that no document has; GPUs
    varlen   flash attention over documents end to end, which computes no pair in vain; GPUs, half precision

On a CPU flex runs unfused and varlen document by document: slowly, and to the same numbers.

Dimensions: B rows, S sequence, N query heads, K key heads (N is a multiple of K), H head dim.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_models.shape import AttentionKernel

T = TypeVar("T")


def attend(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None, kernel: AttentionKernel = "sdpa") -> Tensor:
    """Mixes `v` [B, S, K, H] by the similarity of `q` [B, S, N, H] to `k` [B, S, K, H]; returns [B, S, N, H].

    A token sees itself and earlier tokens of its document. `document_ids` [B, S] int64 never fall within a row; None
    makes each row one document, for which all kernels are one.
    """
    if document_ids is None or kernel == "sdpa":
        return masked_attention(q, k, v, None if document_ids is None else document_mask(document_ids))
    return _flex(q, k, v, document_ids) if kernel == "flex" else _varlen(q, k, v, document_ids)


def document_mask(document_ids: Tensor) -> Tensor:
    """Which token may see which: [B, 1, S, S] bool, true for earlier tokens of the same document.

    `document_ids`: [B, S] int64.
    """
    length = document_ids.shape[1]
    same = document_ids[:, :, None] == document_ids[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    return (same & causal)[:, None]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Mixes `v` [B, T, K, H] by the similarity of `q` [B, S, N, H] to `k` [B, T, K, H]; returns [B, S, N, H].

    `mask` [B, 1, S, T] bool: which token may see which; None: each sees itself and earlier ones, S being T.
    """
    mixed = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return mixed.transpose(1, 2)


class _Latest(Generic[T]):
    """What was made of a tensor of document ids, kept while the same tensor comes again: once for all layers."""

    def __init__(self, make: Callable[[Tensor], T]) -> None:
        self._make = make
        self._of: Callable[[], Tensor | None] = lambda: None
        self._version = -1
        self._made: Any = None

    def __call__(self, document_ids: Tensor) -> T:
        if self._of() is not document_ids or self._version != document_ids._version:
            self._made = self._make(document_ids)
            self._of, self._version = weakref.ref(document_ids), document_ids._version
        return self._made


def _flex(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor) -> Tensor:
    from titan_models.compat import flex_attention_unfused

    product = flex_attention_unfused if q.device.type == "cpu" else _compiled_flex()
    options = {"block_mask": _block_mask(document_ids), "enable_gqa": q.shape[2] != k.shape[2]}
    return product(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options).transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@torch.compiler.disable
def _block_mask(document_ids: Tensor) -> Any:
    return _latest_block_mask(document_ids)


def _make_block_mask(document_ids: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[row, query] == document_ids[row, key])

    rows, length = document_ids.shape
    return create_block_mask(visible, rows, None, length, length, device=document_ids.device)


_latest_block_mask = _Latest(_make_block_mask)


@torch.compiler.disable  # how many documents there are depends on the data
def _varlen(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor) -> Tensor:
    bounds = _latest_bounds(document_ids)
    q_rows, k_rows, v_rows = (tensor.flatten(0, 1) for tensor in (q, k, v))
    if q.device.type == "cpu":
        mixed = _by_document(q_rows, k_rows, v_rows, bounds)
    else:
        mixed = _flash_varlen(q_rows, k_rows, v_rows, bounds, document_ids.shape[1])
    return mixed.view_as(q)


def _make_bounds(document_ids: Tensor) -> Tensor:
    """Where documents begin among all tokens [B * S], then their number: int32 [D + 1]."""
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]
    return torch.cat([starts, starts.new_tensor([document_ids.numel()])]).int()


_latest_bounds = _Latest(_make_bounds)


def _flash_varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # No document is longer than a row; the exact length would have to be waited for.
    options = {"window_size": (-1, 0), "enable_gqa": q.shape[1] != k.shape[1]}
    return cast(Tensor, varlen_attn(q, k, v, bounds, bounds, longest, longest, **options))


def _by_document(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """What flash attention does on a GPU: `q` [T, N, H], `k` and `v` [T, K, H] -> [T, N, H]."""
    sizes = bounds.diff().tolist()
    pieces = zip(*(tensor.split(sizes) for tensor in (q, k, v)), strict=True)
    return torch.cat([masked_attention(one[None], two[None], three[None], None)[0] for one, two, three in pieces])
