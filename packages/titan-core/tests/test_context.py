"""Attention over rows that are spread over ranks, against attention over whole rows in one process."""

import itertools
import warnings
from typing import NamedTuple

import pytest
import torch

# Whatever a rank imports after the fork, each rank would import for itself.
import torch._dynamo
import torch._functorch.aot_autograd
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ranks import run_ranks
from titan_core import context
from titan_core.context import (
    ContextParallelAttention,
    join_sequence,
    sequence_slices,
    shard_sequence,
    visible_blocks,
)

METHODS = ("ring", "allgather", "ulysses")
LENGTH, HEAD_DIM = 24, 8
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}


class Rows(NamedTuple):
    """Whole rows: q [B, S, N, H], k and v [B, S, K, H], the gradient of the result, positions and documents [B, S]."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    positions: Tensor
    documents: Tensor | None

    def shard(self, rank: int, size: int, *, load_balance: bool = True) -> "Rows":
        return Rows(*(None if x is None else shard_sequence(x, rank, size, load_balance=load_balance) for x in self))


def make_rows(
    *,
    batch: int = 1,
    heads: int = 4,
    key_heads: int = 4,
    length: int = LENGTH,
    documents: list[int] | None = None,
    dtype=torch.float64,
) -> Rows:
    """`documents`: the lengths of a row's documents; later rows have them in another order."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, grad = (
        torch.randn(batch, length, n, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype)
        for n in (heads, key_heads, key_heads, heads)
    )
    if documents is None:
        return Rows(q, k, v, grad, torch.arange(length).expand(batch, -1), None)
    rolled = [documents[row:] + documents[:row] for row in range(batch)]
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rolled])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rolled])
    return Rows(q, k, v, grad, positions, ids)


def whole_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, documents: Tensor | None) -> Tensor:
    mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
    if documents is not None:
        mask = (mask & (documents[:, :, None] == documents[:, None]))[:, None]
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ v.transpose(1, 2)).transpose(1, 2)


def run(attention, rows: Rows) -> list[Tensor]:
    """The result and the gradients of q, k and v."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (rows.q, rows.k, rows.v))
    out = attention(q, k, v, rows.positions, rows.documents)
    out.backward(rows.grad)
    return [out.detach(), q.grad, k.grad, v.grad]


def run_on_ranks(size: int, cases: list[tuple[Rows, dict]]) -> list[list[Tensor]]:
    """What `run` gives for whole rows, for each case of rows and arguments of `ContextParallelAttention`."""

    def rank_main() -> list[list[Tensor]]:
        results = []
        for rows, options in cases:
            attention = ContextParallelAttention(whole_attention, dist.group.WORLD, **options)
            part = rows.shard(dist.get_rank(), size, load_balance=options["load_balance"])
            results.append(run(attention, part))
        return results

    ranks = run_ranks(size, rank_main)
    return [
        [join_sequence(parts, load_balance=options["load_balance"]) for parts in zip(*results, strict=True)]
        for (_, options), *results in zip(cases, *ranks, strict=True)
    ]


def check(result: list[Tensor], rows: Rows) -> None:
    wide = Rows(*(x.double() if x is not None and x.is_floating_point() else x for x in rows))
    for name, actual, expected in zip(("out", "dq", "dk", "dv"), result, run(whole_attention, wide), strict=True):
        assert actual.dtype == rows.q.dtype, name
        limit = TOLERANCE[rows.q.dtype] * max(1.0, expected.abs().max().item())
        assert (actual - expected).abs().max() <= limit, name


DOCUMENTS = {
    "one": None,
    "several": [7, 2, 11, 4],
    "at chunk borders": [LENGTH // 4, LENGTH // 4, LENGTH // 2],
    "of one token": [1, 1, 5, 1, 16],
    "only of one token": [1] * LENGTH,
}


@pytest.mark.parametrize(("size", "heads", "key_heads"), [(2, 4, 2), (3, 6, 3), (4, 4, 4)])
def test_result_and_gradients_equal_those_of_whole_rows(size, heads, key_heads):
    cases = [
        (
            make_rows(batch=batch, heads=heads, key_heads=key_heads, documents=documents),
            {"method": method, "load_balance": load_balance},
        )
        for method, load_balance, batch, documents in itertools.product(
            METHODS, (True, False), (1, 3), DOCUMENTS.values()
        )
    ]
    for (rows, _), result in zip(cases, run_on_ranks(size, cases), strict=True):
        check(result, rows)


def test_key_heads_need_not_divide_by_the_ranks_where_heads_are_not_spread():
    rows = make_rows(heads=3, key_heads=1, documents=DOCUMENTS["several"])
    cases = [(rows, {"method": method, "load_balance": True}) for method in ("ring", "allgather")]
    for result in run_on_ranks(2, cases):
        check(result, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_kept(dtype):
    rows = make_rows(heads=8, documents=DOCUMENTS["several"], dtype=dtype)
    cases = [(rows, {"method": method, "load_balance": True}) for method in METHODS]
    for result in run_on_ranks(4, cases):
        check(result, rows)


def test_half_precision_gradients_of_keys_are_summed_in_float32():
    # Each query sees the first key only, so the gradient of its value is a sum over the ranks: 256 + 1 + 1 + 2. In
    # bfloat16 it would end at 258, since 256 + 1 is 256.
    rows = make_rows(length=8, heads=1, key_heads=1, dtype=torch.bfloat16)
    first = torch.zeros_like(rows.k)
    first[:, 0] = 30.0
    grad = torch.zeros_like(rows.grad)
    grad[0, ::2] = torch.tensor([256.0, 1.0, 1.0, 2.0], dtype=grad.dtype)[:, None, None]
    rows = rows._replace(q=torch.full_like(rows.q, 30.0), k=first, grad=grad)
    cases = [(rows, {"method": method, "load_balance": False}) for method in ("ring", "allgather")]
    for result in run_on_ranks(4, cases):
        assert (result[3][0, 0] == 260.0).all()


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_some_inputs_only(method):
    rows = make_rows(documents=DOCUMENTS["several"])
    expected = dict(zip("qkv", run(whole_attention, rows)[1:], strict=True))
    subsets = ["q", "k", "v", "kv"]

    def rank_main() -> list[dict[str, Tensor]]:
        attention = ContextParallelAttention(whole_attention, dist.group.WORLD, method=method)
        part = rows.shard(dist.get_rank(), 2)
        results = []
        for subset in subsets:
            inputs = {name: getattr(part, name).clone().requires_grad_(name in subset) for name in "qkv"}
            attention(*inputs.values(), part.positions, part.documents).backward(part.grad)
            results.append({name: x.grad for name, x in inputs.items() if x.grad is not None})
        return results

    for subset, first, second in zip(subsets, *run_ranks(2, rank_main), strict=True):
        assert "".join(first) == subset
        for name in subset:
            torch.testing.assert_close(
                join_sequence((first[name], second[name])), expected[name], rtol=1e-12, atol=1e-12
            )


@pytest.mark.parametrize("kept", ["nothing", "attention"])
def test_recomputation_changes_nothing(kept):
    """`attention`: the kernels' results are kept, as selective recomputation does."""
    rows = make_rows(batch=2, key_heads=2, documents=DOCUMENTS["several"])
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    options = {"context_fn": lambda: create_selective_checkpoint_contexts([kernel])} if kept == "attention" else {}

    def rank_main() -> list[tuple[list[Tensor], list[Tensor]]]:
        part = rows.shard(dist.get_rank(), 2)
        results = []
        for method in METHODS:
            attention = ContextParallelAttention(whole_attention, dist.group.WORLD, method=method)

            def two_layers(q, k, v, positions, documents, attention=attention):
                return attention(attention(q, k, v, positions, documents), k, v, positions, documents)

            def recomputed(*args, function=two_layers):
                return checkpoint(function, *args, use_reentrant=False, **options)

            results.append((run(two_layers, part), run(recomputed, part)))
        return results

    for results in run_ranks(2, rank_main):
        for kept_all, recomputed in results:
            for a, b in zip(kept_all, recomputed, strict=True):
                assert torch.equal(a, b)


def test_compiled_and_eager_are_equal():
    rows = make_rows(batch=2, key_heads=2, documents=DOCUMENTS["several"])
    graphs = []

    def record(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    def rank_main() -> tuple[list[tuple[list[Tensor], list[Tensor]]], str]:
        part = rows.shard(dist.get_rank(), 2)
        results = []
        # Dynamo warns of what it does itself: instantiating autograd functions, reading .grad.
        with warnings.catch_warnings(action="ignore"):
            for method in METHODS:

                def layer(q, k, v, positions, documents, method=method, group=dist.group.WORLD):
                    attention = ContextParallelAttention(whole_attention, group, method=method)
                    return 2 * attention(q.sin(), 3 * k, v + 1, positions, documents)

                how = {"backend": record} if method == "ring" else {"backend": "aot_eager", "fullgraph": True}
                results.append((run(layer, part), run(torch.compile(layer, **how), part)))
        return results, "".join(graphs)

    for results, ring in run_ranks(2, rank_main):
        for eager, compiled in results:
            for a, b in zip(eager, compiled, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert "sin" in ring
        assert "logaddexp" not in ring  # what cannot be compiled in one piece is not compiled in many


def test_the_group_may_be_a_part_of_the_world():
    rows = [make_rows(length=length, documents=[5, length - 5]) for length in (8, 16)]

    def rank_main() -> list[list[Tensor]]:
        # Neighbours in the world are in different groups.
        groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        mine, index = dist.get_rank() % 2, dist.get_rank() // 2
        part = rows[mine].shard(index, 2)
        return [run(ContextParallelAttention(whole_attention, groups[mine], method=method), part) for method in METHODS]

    ranks = run_ranks(4, rank_main)
    for group in (0, 1):
        for first, second in zip(ranks[group], ranks[group + 2], strict=True):
            check([join_sequence(parts) for parts in zip(first, second, strict=True)], rows[group])


def test_a_sum_may_follow_directly():
    rows = make_rows()
    expected = run(whole_attention, rows._replace(grad=torch.ones_like(rows.grad)))

    def rank_main() -> list[Tensor]:
        part = rows.shard(dist.get_rank(), 2)
        results = []
        for method in METHODS:
            q = part.q.clone().requires_grad_()
            attention = ContextParallelAttention(whole_attention, dist.group.WORLD, method=method)
            attention(q, part.k, part.v, part.positions, None).sum().backward()
            results.append(q.grad)
        return results

    for parts in zip(*run_ranks(2, rank_main), strict=True):
        torch.testing.assert_close(join_sequence(parts), expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("load_balance", [True, False])
def test_ring_computes_and_sends_no_more_than_it_must(load_balance, monkeypatch):
    size, rows = 4, make_rows(batch=2, key_heads=2)
    computed, sent = [], []

    def counting(block_attention):
        def count(q, k, *args, causal, **kwargs):
            pairs = q.shape[2] * k.shape[2]
            computed.append(q.shape[2] * (q.shape[2] + 1) // 2 if causal else pairs)
            return block_attention(q, k, *args, causal=causal, **kwargs)

        return count

    monkeypatch.setattr(context, "block_attention", counting(context.block_attention))
    monkeypatch.setattr(dist.P2POp, "__new__", counting_p2p(sent, dist.P2POp.__new__))

    def rank_main() -> tuple[int, int, int]:
        part = rows.shard(dist.get_rank(), size, load_balance=load_balance)
        attention = ContextParallelAttention(
            whole_attention, dist.group.WORLD, method="ring", load_balance=load_balance
        )
        q = part.q.clone().requires_grad_()
        out = attention(q, part.k, part.v, part.positions, None)
        forward = sum(sent)
        out.backward(part.grad)
        return sum(computed), forward, sum(sent) - forward

    pairs, forward, backward = zip(*run_ranks(size, rank_main), strict=True)
    assert sum(pairs) == LENGTH * (LENGTH + 1) // 2
    assert (max(pairs) == min(pairs)) == load_balance
    keys_and_values = 2 * rows.k.nbytes // size
    assert set(forward) == {(size - 1) * keys_and_values}
    assert set(backward) == {(size - 1) * keys_and_values + size * keys_and_values}


def counting_p2p(sent, new):
    def count(cls, op, tensor, *args, **kwargs):
        if op is dist.isend:
            sent.append(tensor.nbytes)
        return new(cls, op, tensor, *args, **kwargs)

    return count


@pytest.mark.parametrize("load_balance", [True, False])
def test_blocks_cover_the_visible_pairs_once(load_balance):
    size, length = 3, 24
    seen = torch.zeros(length, length, dtype=torch.int64)
    held = [
        shard_sequence(torch.arange(length)[None], rank, size, load_balance=load_balance)[0] for rank in range(size)
    ]
    for rank, source in itertools.product(range(size), repeat=2):
        for block in visible_blocks(rank, source, size, length // size, load_balance=load_balance):
            queries, keys = held[rank][block.queries], held[source][block.keys]
            visible = torch.ones(len(queries), len(keys), dtype=torch.int64)
            seen[queries[:, None], keys] += visible.tril() if block.causal else visible
    assert torch.equal(seen, torch.ones_like(seen).tril())


def test_sequence_slices_pair_the_head_with_the_tail():
    assert sequence_slices(12, 0, 3) == [slice(0, 2), slice(10, 12)]
    assert sequence_slices(12, 2, 3) == [slice(4, 6), slice(6, 8)]
    assert sequence_slices(12, 2, 3, load_balance=False) == [slice(8, 12)]


@pytest.mark.parametrize("load_balance", [True, False])
def test_parts_join_to_the_row_and_keep_its_order(load_balance):
    x = torch.arange(2 * 16 * 3).view(2, 16, 3)
    parts = [shard_sequence(x, rank, 4, load_balance=load_balance) for rank in range(4)]
    assert all(part.shape == (2, 4, 3) and (part.diff(dim=1) > 0).all() for part in parts)
    assert torch.equal(join_sequence(parts, load_balance=load_balance), x)


def test_a_row_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match=r"row of 10 tokens .* 4 equal chunks for 2 .* such as 12\."):
        sequence_slices(10, 0, 2)
    assert sequence_slices(10, 0, 2, load_balance=False) == [slice(0, 5)]


def test_what_does_not_fit_is_refused():
    def rank_main() -> list[str]:
        messages = []

        def attempt(method="ring", q=(1, 4, 4, 8), k=(1, 4, 4, 8), v=None):
            try:
                attention = ContextParallelAttention(whole_attention, dist.group.WORLD, method=method)
                positions = torch.arange(q[1])[None]
                attention(torch.zeros(q), torch.zeros(k), torch.zeros(v or k), positions, None)
            except ValueError as error:
                messages.append(str(error))

        attempt("star")
        attempt(q=(1, 4, 3, 8), k=(1, 4, 2, 8))
        attempt(v=(1, 4, 2, 8))
        attempt(q=(1, 5, 4, 8), k=(1, 5, 4, 8))
        attempt("ulysses", k=(1, 4, 1, 8))
        attempt("ulysses", q=(1, 4, 3, 8), k=(1, 4, 3, 8))
        return messages

    unknown, heads, shapes, odd, key_heads, query_heads = run_ranks(2, rank_main)[0]
    assert "'star'" in unknown
    assert "ring, allgather, ulysses" in unknown
    assert "q [1, 4, 3, 8], k [1, 4, 2, 8]" in heads
    assert "v [1, 4, 2, 8]" in shapes
    assert "5 tokens" in odd
    assert "multiple of 4" in odd
    assert "4 query heads and 1 key heads" in key_heads
    assert "3 query heads and 3 key heads" in query_heads
