"""The kernels, and blocks of keys merged, against plain attention by autograd."""

import pytest
import torch
from torch import Tensor

from titan_core import block_attention as block_attention_module
from titan_core.block_attention import (
    block_attention,
    block_attention_backward,
    merge,
    plain_attention,
    plain_attention_backward,
)
from titan_core.compat import cuda_flash_attention, cuda_flash_attention_backward

KERNELS = {
    "best": (block_attention, block_attention_backward),
    "plain": (plain_attention, plain_attention_backward),
}
QUERIES = KEYS = 12
MASKS = ["none", "causal", "mask", "causal mask"]


def inputs(dtype: torch.dtype = torch.float64, *, key_heads: int = 2, batch: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(batch, length, heads, 8, generator=generator, dtype=torch.float64).transpose(1, 2).to(dtype)
        for length, heads in ((QUERIES, 4), (KEYS, key_heads), (KEYS, key_heads), (QUERIES, 4))
    )


def make_mask(kind: str, batch: int = 2) -> tuple[Tensor | None, bool]:
    """A mask in which some queries see no key at all, and whether the order is causal."""
    mask = torch.rand(batch, QUERIES, KEYS, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[0, 3] = mask[0, 7] = False
    return mask if "mask" in kind else None, "causal" in kind


def scores_of(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    return scores.masked_fill(~torch.ones(QUERIES, KEYS).tril().bool(), -torch.inf) if causal else scores


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("key_heads", [1, 4])
def test_result_log_sum_exp_and_gradients(mask, kernel, key_heads):
    forward, backward = KERNELS[kernel]
    q, k, v, grad = inputs(key_heads=key_heads)
    allowed, causal = make_mask(mask)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    scores = scores_of(leaves[0], leaves[1], allowed, causal)
    # The softmax of no scores is NaN, so queries that see no key get weights of their own: 0.
    sees = (scores > -torch.inf).any(-1, keepdim=True)
    weights = torch.where(sees, scores, 0.0).softmax(-1) * sees
    expected = weights @ leaves[2].repeat_interleave(4 // key_heads, 1)
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    out, lse = forward(q, k, v, allowed, causal=causal)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, scores.detach().logsumexp(-1), rtol=1e-12, atol=1e-12)
    for actual, right in zip(backward(grad, q, k, v, out, lse, allowed, causal=causal), expected_grads, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS)
def test_plain_attention_computes_some_queries_at_a_time(mask, monkeypatch):
    q, k, v, grad = inputs()
    allowed, causal = make_mask(mask)
    whole = plain_attention(q, k, v, allowed, causal=causal)
    whole_grads = plain_attention_backward(grad, q, k, v, *whole, allowed, causal=causal)
    largest = 0

    def measuring(*args, scores=block_attention_module._scores, **kwargs):
        nonlocal largest
        result = scores(*args, **kwargs)
        largest = max(largest, result.numel())
        return result

    limit = 5 * 2 * 4 * KEYS  # five queries, which do not divide the number of queries
    monkeypatch.setattr(block_attention_module, "_TILE_ELEMENTS", limit)
    monkeypatch.setattr(block_attention_module, "_scores", measuring)
    tiled = plain_attention(q, k, v, allowed, causal=causal)
    tiled_grads = plain_attention_backward(grad, q, k, v, *whole, allowed, causal=causal)
    assert largest == limit
    for a, b in zip((*tiled, *tiled_grads), (*whole, *whole_grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_sums_are_at_least_float32(kernel, dtype, limit):
    forward, backward = KERNELS[kernel]
    allowed, _ = make_mask("mask")
    q, k, v, grad = inputs(dtype)
    out, lse = forward(q, k, v, allowed)
    assert lse.dtype == torch.float32
    wide = [x.double() for x in (q, k, v, grad)]
    right_out, right_lse = plain_attention(*wide[:3], allowed)
    torch.testing.assert_close(out.double(), right_out, rtol=0, atol=limit)
    torch.testing.assert_close(lse.double(), right_lse, rtol=0, atol=limit)
    grads = backward(grad, q, k, v, out.to(dtype), lse, allowed)
    right = plain_attention_backward(wide[3], *wide[:3], right_out, right_lse, allowed)
    for actual, expected in zip(grads, right, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2 * limit)


@pytest.mark.parametrize("mask", ["none", "mask"])
def test_blocks_merge_to_the_whole(mask):
    q, k, v, grad = inputs()
    allowed, _ = make_mask(mask)
    whole_out, whole_lse = block_attention(q, k, v, allowed)
    whole_grads = block_attention_backward(grad, q, k, v, whole_out, whole_lse, allowed)
    out, lse = torch.zeros_like(q), torch.full(q.shape[:-1], -torch.inf, dtype=q.dtype)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for keys in (slice(0, 6), slice(6, KEYS)):
        part = None if allowed is None else allowed[:, :, keys]
        merge(out, lse, *block_attention(q, k[:, :, keys], v[:, :, keys], part))
        shares = block_attention_backward(grad, q, k[:, :, keys], v[:, :, keys], whole_out, whole_lse, part)
        grads[0] += shares[0]
        grads[1][:, :, keys] += shares[1]
        grads[2][:, :, keys] += shares[2]
    for actual, expected in zip((out, lse, *grads), (whole_out, whole_lse, *whole_grads), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_calls_of_the_gpu_kernel_fit_its_operators():
    q, k, v, grad = (x.to("meta") for x in inputs(torch.bfloat16))
    out, lse = cuda_flash_attention(q, k, v, causal=True)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:-1], torch.float32)
    grads = cuda_flash_attention_backward(grad, q, k, v, out, lse, causal=True)
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_agrees_with_plain_attention(mask, dtype):
    q, k, v, grad = inputs(dtype)
    allowed, causal = make_mask(mask)
    out, lse = plain_attention(q, k, v, allowed, causal=causal)
    grads = plain_attention_backward(grad, q, k, v, out, lse, allowed, causal=causal)
    q, k, v, grad = (x.cuda() for x in (q, k, v, grad))
    allowed = None if allowed is None else allowed.cuda()
    gpu_out, gpu_lse = block_attention(q, k, v, allowed, causal=causal)
    gpu_grads = block_attention_backward(grad, q, k, v, gpu_out.to(dtype), gpu_lse, allowed, causal=causal)
    for actual, expected in zip((gpu_out, gpu_lse, *gpu_grads), (out, lse, *grads), strict=True):
        torch.testing.assert_close(actual.cpu().float(), expected, rtol=0, atol=8e-2 if dtype.itemsize == 2 else 1e-4)
