"""What a decoder's forward and backward keep in memory, block by block, from its configuration alone; torch-free.

The programs here mirror `titan_models.decoder` and its parts. What parallelism changes enters in two ways: `Extent`
says how much of rows, tokens, inner dimensions, vocabulary and experts this device has, and `Surroundings` does what
happens where a region of the model begins and ends; another implementation may communicate there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from titan_models.operations import (
    adapted_linear,
    add,
    cast,
    flash_attention,
    linear,
    masked_attention,
    multiply,
    rms_norm,
    rope,
    scaled,
    silu,
    wide,
)
from titan_models.shape import DecoderShape, MoEConfig
from titan_models.tape import Buffer, Played, Remat, Tape, Value, play

_INT64 = 8


class Surroundings(Protocol):
    """What happens around the parts of a model that parallelism knows; sizes follow from those of the arguments."""

    def enter(self, tape: Tape, x: Value) -> Value:
        """Hidden states into a region, or into the head."""
        ...

    def leave(self, tape: Tape, x: Value) -> Value:
        """A region's result, or the embedding's, into the residual stream."""
        ...

    def looked_up(self, tape: Tape, x: Value) -> Value:
        """What the embedding does with the rows it has looked up."""
        ...

    def attend(self, tape: Tape, q: Value, k: Value, v: Value, queries: int) -> Value | None:
        """Attention for so many `queries`, those of each head counted; None: the model's own."""
        ...

    def dispatch(self, tape: Tape, x: Value) -> Value:
        """Rows sorted by expert, to where the experts are."""
        ...

    def collect(self, tape: Tape, x: Value) -> Value:
        """The experts' results, back to where the rows came from."""
        ...


class OneDevice:
    """Nothing happens: see `Surroundings`."""

    def enter(self, tape: Tape, x: Value) -> Value:
        """See `Surroundings`."""
        return x

    leave = looked_up = dispatch = collect = enter

    def attend(self, tape: Tape, q: Value, k: Value, v: Value, queries: int) -> Value | None:
        """See `Surroundings`."""
        return None


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much of a micro-batch and of the model this device computes, and in what."""

    rows: int
    """B: rows of a micro-batch."""
    length: int
    """Tokens of a row on this device."""
    itemsize: int
    """Bytes of an element of activations."""
    stream_parts: int = 1
    """Into how many parts the sequence is cut between regions."""
    inner_parts: int = 1
    """Into how many parts heads, inner dimensions and the vocabulary are cut."""
    expert_parts: int = 1
    """Into how many parts experts are cut."""
    confined: bool = False
    """Whether attention is confined to documents by a mask."""
    chunk_tokens: int = 2048
    """Tokens whose logits exist at one time."""
    frozen: bool = False
    """Whether nothing but adapters is trained."""
    adapters: Mapping[str, int] = field(default_factory=dict)
    """Role of linear layers (`colwise`, `rowwise`) -> the rank of their adapters."""

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on this device."""
        return self.rows * self.length

    @property
    def stream(self) -> int:
        """Tokens between regions."""
        return self.rows * -(-self.length // self.stream_parts)


class DecoderActivations:
    """Plays the parts of one decoder."""

    def __init__(self, config: DecoderShape, extent: Extent, around: Surroundings | None = None) -> None:
        self._config, self._extent, self._around = config, extent, around or OneDevice()
        self._hidden = extent.stream * config.dim * extent.itemsize
        self._blocks: dict[tuple[bool, bool, Remat, bool, bool], Played] = {}
        self._vocabulary = -(-config.vocab_size // extent.inner_parts)

    @property
    def hidden(self) -> int:
        """Bytes of the hidden states of a micro-batch between two blocks, on this device."""
        return self._hidden

    def rope_table(self) -> int:
        """Bytes of the rotary embeddings' cosines and sines, which are alive while any block needs them."""
        return self._extent.tokens * self._config.head_dim * wide(self._extent.itemsize)

    def embedding(self) -> Played:
        """The look-up of tokens."""

        def program(tape: Tape, x: Value) -> Value:
            extent, trains = self._extent, not self._extent.frozen

            def backward(gradient: Buffer) -> tuple[None]:
                tape.gradient(self._vocabulary * self._config.dim)
                return (None,)

            with tape.scope() as kept:
                size = extent.tokens * self._config.dim * extent.itemsize
                rows = tape.op(size, (x,), backward, trains=trains)
                looked_up = self._around.looked_up(tape, rows)
                if looked_up is not rows:
                    tape.drop(rows)
                kept.append(result := self._around.leave(tape, looked_up))
            return result

        return play(program, 0, needs_gradient=False)

    def block(
        self,
        layer: int,
        *,
        needs_gradient: bool = True,
        remat: Remat = "none",
        lent: bool = False,
        gradient_lent: bool = False,
    ) -> Played:
        """A block; see `titan_models.tape.play` for the options. Equal blocks are one object."""
        key = self._config.has_experts(layer), needs_gradient, remat, lent, gradient_lent
        if key not in self._blocks:
            self._blocks[key] = self._play_block(*key)
        return self._blocks[key]

    def _play_block(
        self, has_experts: bool, needs_gradient: bool, remat: Remat, lent: bool, gradient_lent: bool
    ) -> Played:

        def program(tape: Tape, x: Value) -> Value:
            with tape.scope() as kept:
                normed = self._norm(tape, x)
                attended = self._attention(tape, normed)
                tape.drop(normed)
                middle = add(tape, x, attended)
                tape.drop(attended)
                normed = self._norm(tape, middle)
                moe = self._config.moe
                if moe is None or not has_experts:
                    mixed = self._feed_forward(tape, normed, self._config.hidden_dim)
                else:
                    mixed = self._experts(tape, normed, moe)
                kept.append(result := add(tape, middle, mixed))
                tape.drop(mixed)
            return result

        return play(
            program,
            self._hidden,
            needs_gradient=needs_gradient,
            remat=remat,
            lent=lent,
            gradient_lent=gradient_lent,
        )

    def head(self, *, needs_gradient: bool = True) -> Played:
        """The last norm and the loss; the result is a scalar."""

        def program(tape: Tape, x: Value) -> Value:
            with tape.scope() as kept:
                normed = self._norm(tape, x)
                tape.drop(x)
                kept.append(loss := self._loss(tape, normed))
            return loss

        return play(program, self._hidden, needs_gradient=needs_gradient)

    def _norm(self, tape: Tape, x: Value) -> Value:
        return rms_norm(tape, x, self._config.dim, self._extent.itemsize, trains=not self._extent.frozen)

    def _linear(self, tape: Tape, x: Value, rows: int, columns: int, role: str) -> Value:
        """A layer from `columns` to `rows` elements a token, both as this device has them."""
        extent = self._extent
        tokens = x.size // (columns * extent.itemsize)
        size = tokens * rows * extent.itemsize
        if not extent.frozen:
            return linear(tape, x, size, rows * columns)
        if role not in extent.adapters:
            return linear(tape, x, size, rows * columns, trains=False)
        rank = extent.adapters[role]
        return adapted_linear(tape, x, size, (tokens * rank * extent.itemsize, rank * columns), rows * rank)

    def _attention(self, tape: Tape, normed: Value) -> Value:
        config, extent = self._config, self._extent
        queries, keys = (heads * config.head_dim // extent.inner_parts for heads in (config.heads, config.kv_heads))
        with tape.scope() as kept:
            x = self._around.enter(tape, normed)
            q = self._linear(tape, x, queries, config.dim, "colwise")
            k = self._linear(tape, x, keys, config.dim, "colwise")
            v = self._linear(tape, x, keys, config.dim, "colwise")
            if config.qk_norm:
                plain, trains = (q, k), not extent.frozen
                q, k = (rms_norm(tape, p, config.head_dim, extent.itemsize, trains=trains) for p in plain)
                tape.drop(*plain)
            unturned = q, k
            q, k = (rope(tape, x, extent.itemsize) for x in unturned)
            tape.drop(*unturned)
            count = extent.tokens * config.heads // extent.inner_parts
            mixed = self._around.attend(tape, q, k, v, count) or self._attend(tape, q, k, v, count)
            kept.append(result := self._out(tape, mixed, queries))
        return result

    def _attend(self, tape: Tape, q: Value, k: Value, v: Value, queries: int) -> Value:
        extent = self._extent
        if not extent.confined:
            return flash_attention(tape, q, k, v, queries=queries)
        return masked_attention(
            tape, q, k, v, queries=queries, rows=extent.rows, length=extent.length, itemsize=extent.itemsize
        )

    def _feed_forward(self, tape: Tape, normed: Value, width: int) -> Value:
        dim, inner = self._config.dim, width // self._extent.inner_parts
        with tape.scope() as kept:
            x = self._around.enter(tape, normed)
            gate = self._linear(tape, x, inner, dim, "colwise")
            activated = silu(tape, gate)
            tape.drop(gate)
            up = self._linear(tape, x, inner, dim, "colwise")
            hidden = multiply(tape, activated, up)
            tape.drop(activated, up)
            kept.append(result := self._out(tape, hidden, inner))
        return result

    def _out(self, tape: Tape, x: Value, columns: int) -> Value:
        with tape.scope() as kept:
            kept.append(result := self._around.leave(tape, self._linear(tape, x, self._config.dim, columns, "rowwise")))
        return result

    def _experts(self, tape: Tape, x: Value, moe: MoEConfig) -> Value:
        config, extent, trains = self._config, self._extent, not self._extent.frozen
        copies, rows = x.size * moe.top_k, extent.stream * moe.top_k
        inner, own = rows * moe.hidden_dim * extent.itemsize, moe.experts // extent.expert_parts
        weights = own * moe.hidden_dim * config.dim

        def to_experts(gradient: Buffer) -> tuple[Buffer]:
            sorted_back = tape.new(copies)
            result = tape.new(x.size)
            tape.drop(sorted_back)
            return (result,)

        def mix(gradient: Buffer) -> tuple[Buffer, Buffer]:
            return tape.new(shares.size), tape.new(copies)

        with tape.scope() as kept:
            shares = self._route(tape, x, moe)
            order, inverse = tape.plain(rows * _INT64), tape.plain(rows * _INT64)
            with tape.scope() as handed_back:
                copied = tape.op(copies, (x,), to_experts, saves=(inverse,))
                arrived = self._around.dispatch(tape, copied)
                gate = linear(tape, arrived, inner, weights, trains=trains)
                activated = silu(tape, gate)
                tape.drop(gate)
                up = linear(tape, arrived, inner, weights, trains=trains)
                hidden = multiply(tape, activated, up)
                tape.drop(activated, up)
                computed = linear(tape, hidden, copies, weights, trains=trains)
                tape.drop(hidden)
                handed_back.append(outputs := self._around.collect(tape, computed))
            by_token = tape.op(copies, (outputs,), lambda gradient: (tape.new(copies),), saves=(order,))
            result = tape.op(x.size, (shares, by_token), mix, saves=(shares, by_token), costly=True)
            if moe.shared_hidden_dim:
                shared = self._feed_forward(tape, x, moe.shared_hidden_dim)
                result = add(tape, result, shared)
            kept.append(result)
        return result

    def _route(self, tape: Tape, x: Value, moe: MoEConfig) -> Value:
        """The shares of each token's experts in its result; scores of all experts are computed twice."""
        config, extent, trains = self._config, self._extent, not self._extent.frozen
        step = wide(extent.itemsize)
        scores, chosen = extent.stream * moe.experts * step, extent.stream * moe.top_k

        def choose(gradient: Buffer) -> tuple[Buffer]:
            spread, summed = tape.new(scores), tape.new(scores)
            tape.drop(spread)
            tape.drop(summed)
            return (tape.new(scores),)

        with tape.scope() as kept:
            exact = x if step == extent.itemsize else cast(tape, x, x.size // extent.itemsize * step)
            logits = linear(tape, exact, scores, moe.experts * config.dim, trains=trains)
            indices = tape.plain(chosen * _INT64)
            auxiliary = tape.plain(scores if moe.balance_loss or moe.z_loss else 0)
            tape.passing(*[scores] * (5 if auxiliary.size else 1))
            accounted = tape.op(scores, (logits,), lambda g: (tape.share(g),), saves=(auxiliary,), new=False)
            scored = tape.op(scores, (accounted,), choose, saves=(indices,), saves_result=True)
            shares = tape.op(chosen * step, (scored,), lambda gradient: (tape.new(scores),))
            kept.append(result := scaled(tape, shares))
        return result

    def _loss(self, tape: Tape, normed: Value) -> Value:
        """Cross-entropy in chunks of tokens, whose gradients are computed in the forward."""
        config, extent, trains = self._config, self._extent, not self._extent.frozen
        itemsize, step, cut = extent.itemsize, wide(extent.itemsize), extent.inner_parts > 1
        chunks = -(-extent.tokens // extent.chunk_tokens)
        logits = min(extent.chunk_tokens, extent.tokens) * self._vocabulary
        weights = self._vocabulary * config.dim
        with tape.scope() as kept:
            hidden = self._around.enter(tape, normed)
            of_hidden = tape.new(hidden.size if hidden.needs_gradient else 0)
            summed_wide = cut or (chunks > 1 and step > itemsize)
            of_weight = tape.new(weights * (step if summed_wide else itemsize)) if trains else tape.new(0)
            before: Buffer | None = None
            for _ in range(min(chunks, 2)):
                of_logits = self._chunk(tape, logits)
                if before is not None:
                    tape.drop(before)
                if trains and summed_wide:
                    tape.passing(weights * itemsize)
                before = of_logits
            rounded = tape.new(weights * itemsize) if trains and summed_wide and step > itemsize else None
            if rounded is not None:
                tape.drop(of_weight)
                of_weight = rounded
            if before is not None:
                tape.drop(before)

            def backward(gradient: Buffer) -> tuple[Buffer | None]:
                if not cut:  # what is kept becomes the gradient
                    tape.drop(of_weight)
                if trains:
                    tape.gradient(weights)
                if not hidden.needs_gradient:
                    return (None,)
                return (tape.new(hidden.size) if cut else tape.share(of_hidden),)

            saves = (of_hidden, of_weight) if cut else (of_hidden,)
            kept.append(loss := tape.op(0, (hidden,), backward, saves=saves, trains=trains))
            tape.drop(of_hidden, *((of_weight,) if cut else ()))
        return loss

    def _chunk(self, tape: Tape, logits: int) -> Buffer:
        """The gradient of a chunk's logits."""
        itemsize, step = self._extent.itemsize, wide(self._extent.itemsize)
        raw = tape.new(logits * itemsize)
        exact = raw if step == itemsize else tape.new(logits * step)
        gradient = tape.new(logits * step)
        if self._extent.inner_parts > 1:
            tape.passing(logits * step)
        tape.drop(exact)
        if exact is raw:
            return gradient
        rounded = tape.new(logits * itemsize)
        tape.drop(raw, gradient)
        return rounded
