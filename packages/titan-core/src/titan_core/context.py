"""Context parallelism: the tokens of a row are spread over the ranks of a group, and only attention sees them all.

A rank holds one or two chunks of each row. With load balancing a row is cut into twice as many chunks as there
are ranks, and rank r holds the chunks r from the start and r from the end: its queries see as many keys as every
other rank's. Without, a row has one chunk a rank, in order. A rank's tokens keep the row's order. Which token may
see which follows from that order and from document ids, never from positions.

Three ways to see the other ranks' keys and values, with equal results:

- ring: they are passed on from rank to rank while attention to those at hand is computed, and the results are
  merged. It holds no more than two ranks' keys and values at a time. Where `titan_core.block_attention` has no fast
  kernel (document masks on a GPU), the others are faster. Source: arXiv 2310.01889.
- allgather: every rank gathers the layer's keys and values, and builds a bool mask [S / ranks, S] for each row.
- ulysses: tokens are exchanged for heads, each rank attends for its heads in whole rows, and they are exchanged
  back. It runs the model's own attention; query and key heads must divide by the ranks. Source: arXiv 2309.14509.

All three are pure functions: activations may be recomputed, and micro-batches may come in any order that is the
same on all ranks. allgather and ulysses compile into the graph around them; ring breaks it.

Dimensions: B batch, S row, L a rank's part of it, N query heads, K key heads, H head dim.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from titan_core.block_attention import block_attention, block_attention_backward, merge
from titan_core.collectives import all_gather, all_to_all
from titan_core.compat import functional_all_to_all

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
Method = Literal["ring", "allgather", "ulysses"]


def sequence_slices(length: int, rank: int, size: int, *, load_balance: bool = True) -> list[slice]:
    """Which tokens of a row of `length` tokens rank `rank` of `size` holds, in the order in which it holds them.

    Raises:
        ValueError: if the row cannot be cut into equal chunks.
    """
    count = size * _chunks_per_rank(load_balance)
    if length % count:
        raise ValueError(
            f"A row of {length} tokens cannot be cut into {count} equal chunks for {size} context-parallel ranks; "
            f"use a length that is a multiple of {count}, such as {-(-length // count) * count}."
        )
    chunk = length // count
    return [slice(i * chunk, (i + 1) * chunk) for i in _chunks(rank, size, load_balance)]


def shard_sequence(x: Tensor, rank: int, size: int, *, load_balance: bool = True) -> Tensor:
    """The tokens of `x` [B, S, *] that rank `rank` of `size` holds: [B, S / size, *].

    Raises:
        ValueError: as `sequence_slices`.
    """
    return torch.cat([x[:, tokens] for tokens in sequence_slices(x.shape[1], rank, size, load_balance=load_balance)], 1)


def join_sequence(parts: Sequence[Tensor], *, load_balance: bool = True) -> Tensor:
    """Whole rows [B, S, *] from the parts [B, L, *] of all ranks, in rank order: the inverse of `shard_sequence`."""
    size = len(parts)
    chunks: dict[int, Tensor] = {}
    for rank, part in enumerate(parts):
        held = _chunks(rank, size, load_balance)
        chunks.update(zip(held, part.chunk(len(held), 1), strict=True))
    return torch.cat([chunks[i] for i in sorted(chunks)], 1)


def _chunks_per_rank(load_balance: bool) -> int:
    return 2 if load_balance else 1


def _chunks(rank: int, size: int, load_balance: bool) -> tuple[int, ...]:
    return (rank, 2 * size - 1 - rank) if load_balance else (rank,)


class ContextParallelAttention:
    """Causal attention confined to documents, for rows that are spread over the ranks of `group`.

    It is called like the `attention` that it stands in for. ulysses runs that one, on whole rows; ring and
    allgather have kernels of their own.

    Raises:
        ValueError: if `method` is unknown.
    """

    def __init__(self, attention: Attention, group: ProcessGroup, *, method: Method, load_balance: bool = True) -> None:
        if method not in get_args(Method):
            known = ", ".join(get_args(Method))
            raise ValueError(f"There is no context-parallel method {method!r}; use one of {known}.")
        self._method = method
        self._attention = attention
        self._group = group
        self._rank, self._size = group.rank(), group.size()
        self._load_balance = load_balance

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, document_ids: Tensor | None) -> Tensor:
        """Mixes `v` [B, L, K, H] by the similarity of `q` [B, L, N, H] and `k` [B, L, K, H]; N is a multiple of K.

        `document_ids` [B, L] int64: a token sees earlier tokens with its own id; None: each row is one document.
        `positions` [B, L] int64 are handed to the replaced attention. All arguments are this rank's part of the rows.
        Returns [B, L, N, H] in the dtype of `q`.

        Raises:
            ValueError: if shapes do not fit each other or the number of ranks.
        """
        self._check(q, k, v)
        if self._method == "ring":
            return self._ring(q, k, v, document_ids)
        if self._method == "allgather":
            return self._allgather(q, k, v, document_ids)
        return self._ulysses(q, k, v, positions, document_ids)

    def _ring(self, q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None) -> Tensor:
        documents = None if document_ids is None else all_gather(document_ids[None], 0, self._group)
        ring = _RingAttention.apply
        if torch.compiler.is_compiling():
            # Sends and receives cannot be compiled. Not a decorator: that would import the compiler for every run.
            ring = torch.compiler.disable(ring)
        return ring(q, k, v, documents, self._group, self._load_balance)

    def _allgather(self, q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None) -> Tensor:
        keys, values = self._join(_GatherStacked.apply(torch.cat((k, v), 2), self._group)).chunk(2, 2)
        documents = None if document_ids is None else self._join(all_gather(document_ids[None], 0, self._group))
        held = sequence_slices(keys.shape[1], self._rank, self._size, load_balance=self._load_balance)
        mixed = [
            _attend_to_prefix(chunk, keys[:, : tokens.stop], values[:, : tokens.stop], documents)
            for chunk, tokens in zip(q.chunk(len(held), 1), held, strict=True)
        ]
        return torch.cat(mixed, 1)

    def _ulysses(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, document_ids: Tensor | None) -> Tensor:
        size, heads = self._size, q.shape[2]
        # One message for each rank: its heads of q, k and v.
        messages = torch.cat([x.unflatten(2, (size, -1)) for x in (q, k, v)], 3).movedim(2, 0)
        kinds = [heads // size, k.shape[2] // size, v.shape[2] // size]
        whole_q, whole_k, whole_v = self._join(self._exchange(messages)).split(kinds, 2)
        facts = [positions] if document_ids is None else [positions, document_ids]
        whole_facts = self._join(all_gather(torch.stack(facts, -1)[None], 0, self._group)).unbind(-1)
        whole_ids = None if document_ids is None else whole_facts[1]
        mixed = self._attention(whole_q, whole_k, whole_v, whole_facts[0], whole_ids)
        parts = [shard_sequence(mixed, rank, size, load_balance=self._load_balance) for rank in range(size)]
        return self._exchange(torch.stack(parts)).movedim(0, 2).flatten(2, 3)

    def _join(self, parts: Tensor) -> Tensor:
        return join_sequence(parts.unbind(), load_balance=self._load_balance)

    def _exchange(self, messages: Tensor) -> Tensor:
        """`messages` [ranks, *], one for each rank -> those that each rank sent here."""
        one_each = [1] * self._size
        return all_to_all(messages, one_each, one_each, self._group)

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        heads, key_heads = q.shape[2], k.shape[2]
        if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or heads % key_heads:
            raise ValueError(
                f"Attention was called with q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}; k and v need "
                "one shape [B, L, K, H], and q [B, L, N, H] with N a multiple of K."
            )
        if q.shape[1] % _chunks_per_rank(self._load_balance):
            raise ValueError(
                f"Each of {self._size} context-parallel ranks got {q.shape[1]} tokens of a row, which load balancing "
                f"cannot halve; use rows whose length is a multiple of {2 * self._size}, or no load balancing."
            )
        if self._method == "ulysses" and (heads % self._size or key_heads % self._size):
            raise ValueError(
                f"Ulysses spreads heads over {self._size} ranks, which divides not both {heads} query heads and "
                f"{key_heads} key heads; use the method ring or allgather, or fewer context-parallel ranks."
            )


def _attend_to_prefix(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """Attends from `q` [B, Q, N, H], the last tokens of the prefix of a row that `k`, `v` [B, T, K, H] are.

    `documents` [B, S] are the whole row's.
    """
    start, stop = k.shape[1] - q.shape[1], k.shape[1]
    mask = torch.ones(q.shape[1], stop, dtype=torch.bool, device=q.device).tril(start)
    if documents is not None:
        mask = mask & (documents[:, start:stop, None] == documents[:, None, :stop])[:, None]
    # GPUs' kernels that take a mask know no shared key heads.
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)


class _GatherStacked(torch.autograd.Function):
    """Every rank's `x`, stacked: [ranks, *]. The backward is a reduce-scatter.

    It sums in rank order and in at least float32, which a reduce-scatter of half-precision numbers would not, and sends
    no more bytes than it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x[None], 0, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        one_each = [1] * ctx.group.size()
        parts = functional_all_to_all(grad.contiguous(), one_each, one_each, ctx.group)
        return parts.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype), None


class Block(NamedTuple):
    """A chunk of one rank's queries that sees a chunk of one rank's keys: where they lie in those ranks' parts."""

    queries: slice
    keys: slice
    causal: bool
    """Whether both are the same chunk of the row, so that a query sees the keys up to itself."""


def visible_blocks(rank: int, source: int, size: int, length: int, *, load_balance: bool = True) -> list[Block]:
    """Which chunks of rank `rank`'s queries see which chunks of rank `source`'s keys; each holds `length` tokens."""
    chunk = length // _chunks_per_rank(load_balance)
    return [
        Block(slice(i * chunk, (i + 1) * chunk), slice(j * chunk, (j + 1) * chunk), query == key)
        for i, query in enumerate(_chunks(rank, size, load_balance))
        for j, key in enumerate(_chunks(source, size, load_balance))
        if key <= query
    ]


class _RingAttention(torch.autograd.Function):
    """Ring attention: `q` [B, L, N, H], `k`, `v` [B, L, K, H], `documents` [ranks, B, L] or None -> [B, L, N, H].

    Sums are in at least float32, and always in the order of the ring.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, group: ProcessGroup, load_balance: bool
    ) -> Tensor:
        ring = _Ring(group, documents, load_balance)
        queries = q.transpose(1, 2)
        out = torch.zeros_like(queries, dtype=torch.promote_types(q.dtype, torch.float32))
        lse = out.new_full(out.shape[:-1], -torch.inf)
        for held, blocks in ring.visits(torch.stack((k, v))):
            keys, values = held.transpose(2, 3)
            for (rows, columns, causal), mask in blocks:
                block = block_attention(
                    queries[:, :, rows], keys[:, :, columns], values[:, :, columns], mask, causal=causal
                )
                merge(out[:, :, rows], lse[:, :, rows], *block)
        mixed = out.to(q.dtype).transpose(1, 2)
        ctx.save_for_backward(q, k, v, documents, mixed, lse)
        ctx.group, ctx.load_balance = group, load_balance
        return mixed

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return (*_ring_backward(ctx, *grad_outputs), None, None, None)


@once_differentiable
def _ring_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sends keys and values around the ring again; their gradients follow one rank behind, and end at home."""
    q, k, v, documents, mixed, lse = ctx.saved_tensors
    ring = _Ring(ctx.group, documents, ctx.load_balance)
    queries, grad_out, out = (x.transpose(1, 2) for x in (q, grad, mixed))
    grad_q = torch.zeros_like(queries, dtype=lse.dtype)
    homeward: Callable[[], Tensor] = _nothing
    for held, blocks in ring.visits(torch.stack((k, v))):
        grad_held = torch.zeros_like(held, dtype=lse.dtype)
        (keys, values), (grad_keys, grad_values) = held.transpose(2, 3), grad_held.transpose(2, 3)
        for (rows, columns, causal), mask in blocks:
            grads = block_attention_backward(
                grad_out[:, :, rows],
                queries[:, :, rows],
                keys[:, :, columns],
                values[:, :, columns],
                out[:, :, rows],
                lse[:, :, rows],
                mask,
                causal=causal,
            )
            grad_q[:, :, rows] += grads[0]
            grad_keys[:, :, columns] += grads[1]
            grad_values[:, :, columns] += grads[2]
        grad_held += homeward()
        homeward = ring.pass_on(grad_held)
    grad_k, grad_v = homeward()
    return grad_q.transpose(1, 2).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _nothing() -> Tensor:
    return torch.zeros(())


class _Ring:
    """The ranks of `group` as a ring, seen from one of them; `documents` [ranks, B, L] are all ranks' document ids."""

    def __init__(self, group: ProcessGroup, documents: Tensor | None, load_balance: bool) -> None:
        self._group = group
        self._rank, self._size = group.rank(), group.size()
        self._documents = documents
        self._load_balance = load_balance

    def visits(self, held: Tensor) -> Iterator[tuple[Tensor, list[tuple[Block, Tensor | None]]]]:
        """Every rank's `held` [2, B, L, K, H], this rank's first and the next one's last, while another is on its way.

        With each come the blocks of it that this rank's queries see, and their documents' masks [B, queries, keys].
        """
        for step in range(self._size):
            last = step == self._size - 1
            arrive = _nothing if last else self.pass_on(held)
            yield held, self._blocks((self._rank - step) % self._size, held.shape[2])
            held = arrive()

    def pass_on(self, x: Tensor) -> Callable[[], Tensor]:
        """Starts to send `x`, which must stay as it is, to the next rank; returns what waits for the previous one's."""
        received = torch.empty_like(x)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, x, group=self._group, group_peer=(self._rank + 1) % self._size),
                dist.P2POp(dist.irecv, received, group=self._group, group_peer=(self._rank - 1) % self._size),
            ]
        )

        def arrive() -> Tensor:
            for work in works:
                work.wait()
            return received

        return arrive

    def _blocks(self, source: int, length: int) -> list[tuple[Block, Tensor | None]]:
        blocks = visible_blocks(self._rank, source, self._size, length, load_balance=self._load_balance)
        if self._documents is None:
            return [(block, None) for block in blocks]
        mine, theirs = self._documents[self._rank], self._documents[source]
        return [(block, mine[:, block.queries, None] == theirs[:, None, block.keys]) for block in blocks]
