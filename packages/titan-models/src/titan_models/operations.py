"""What the operations of a decoder leave in memory, for `titan_models.tape`: sizes in bytes, no torch imported.

Each function stands for one of the model's modules or expressions, and takes and keeps what torch's own operators on a
CPU take and keep. RMSNorm is there made of elementary operations; attention is a flash kernel, without scores.
"""

from collections.abc import Sequence

from titan_models.tape import Buffer, Tape, Value

_LSE_BYTES = 4  # of the logarithm of a softmax's sum, which flash kernels keep for each query and head


def wide(itemsize: int) -> int:
    """Bytes of an element in at least float32."""
    return max(itemsize, 4)


def cast(tape: Tape, x: Value, size: int) -> Value:
    """`x` in another dtype."""
    return tape.op(size, (x,), lambda gradient: (tape.new(x.size),))


def add(tape: Tape, x: Value, y: Value) -> Value:
    """`x + y`."""
    return tape.op(x.size, (x, y), lambda gradient: (tape.share(gradient), tape.share(gradient)))


def scaled(tape: Tape, x: Value) -> Value:
    """`x` times a number or a small constant tensor."""
    return tape.op(x.size, (x,), lambda gradient: (tape.new(x.size),))


def multiply(tape: Tape, x: Value, y: Value) -> Value:
    """`x * y`."""
    return tape.op(x.size, (x, y), lambda gradient: (tape.new(x.size), tape.new(y.size)), saves=(x, y))


def silu(tape: Tape, x: Value) -> Value:
    """`silu(x)`."""
    return tape.op(x.size, (x,), lambda gradient: (tape.new(x.size),), saves=(x,))


def linear(tape: Tape, x: Value, size: int, weights: int, *, trains: bool = True) -> Value:
    """A linear layer with `weights` elements, or several of them side by side, whose result has `size` bytes."""

    def backward(gradient: Buffer) -> Sequence[Buffer | None]:
        if trains:
            tape.gradient(weights)
        return (tape.new(x.size) if x.needs_gradient else None,)

    saves = (x if trains else Buffer(0),)  # a weight that is kept costs nothing more
    return tape.op(size, (x,), backward, saves=saves, trains=trains, costly=True)


def adapted_linear(tape: Tape, x: Value, size: int, down: tuple[int, int], up: int) -> Value:
    """A frozen linear layer plus its adapter: `down` are bytes and weights of the narrow result, `up` weights."""
    with tape.scope() as kept:
        narrow = linear(tape, x, down[0], down[1])
        base = linear(tape, x, size, 0, trains=False)
        wide_again = linear(tape, narrow, size, up)
        correction = scaled(tape, wide_again)
        tape.drop(wide_again)
        kept.append(result := add(tape, base, correction))
    return result


def rms_norm(tape: Tape, x: Value, width: int, itemsize: int, *, trains: bool = True) -> Value:
    """RMSNorm over the last `width` elements, computed in at least float32."""
    step = wide(itemsize)
    whole = x.size // itemsize * step

    def of_root(gradient: Buffer) -> Sequence[Buffer | None]:
        spread, power, twice, result = (tape.new(whole) for _ in range(4))
        tape.drop(twice, power, spread)
        return (result,)

    def of_quotient(gradient: Buffer) -> Sequence[Buffer | None]:
        of_x, of_factors = tape.new(whole), tape.new(whole)
        summed = tape.new(whole // width)
        tape.drop(of_factors)
        return of_x, summed

    def of_weight(gradient: Buffer) -> Sequence[Buffer | None]:
        of_x = tape.new(whole) if x.needs_gradient else None
        if trains:
            tape.passing(whole)
            tape.gradient(width)
        return (of_x,)

    with tape.scope() as kept:
        exact = x if step == itemsize else cast(tape, x, whole)
        tape.passing(whole)
        factors = tape.op(whole // width, (exact,), of_root, saves=(exact,))
        quotient = tape.op(whole, (exact, factors), of_quotient, saves=(exact, factors))
        saves = (quotient,) if trains else (Buffer(0),)
        result = tape.op(whole, (quotient,), of_weight, saves=saves, trains=trains)
        kept.append(result if step == itemsize else (result := cast(tape, result, x.size)))
    return result


def rope(tape: Tape, x: Value, itemsize: int) -> Value:
    """Rotary embedding, computed in at least float32."""
    step = wide(itemsize)
    whole = x.size // itemsize * step
    half = whole // 2

    def backward(gradient: Buffer) -> Sequence[Buffer | None]:
        first, second, negative = (tape.new(half) for _ in range(3))
        of_second = tape.new(half)
        tape.drop(negative)
        lower = tape.new(half)
        tape.drop(second, of_second)
        of_first = tape.new(half)
        upper = tape.new(half)
        tape.drop(first, of_first)
        result = tape.new(whole)
        tape.drop(lower, upper)
        return (result,)

    with tape.scope() as kept:
        exact = x if step == itemsize else cast(tape, x, whole)
        halves = []
        for _ in range(2):
            products = tape.new(half), tape.new(half)
            halves.append(tape.new(half))
            tape.drop(*products)
        result = tape.op(whole, (exact,), backward)
        tape.drop(*halves)
        kept.append(result if step == itemsize else (result := cast(tape, result, x.size)))
    return result


def flash_attention(tape: Tape, q: Value, k: Value, v: Value, *, queries: int, mask: Buffer | None = None) -> Value:
    """A flash kernel for so many `queries`, those of each head counted; `mask` is kept too."""

    def backward(gradient: Buffer) -> Sequence[Buffer | None]:
        return tuple(tape.new(x.size) for x in (q, k, v))

    with tape.scope() as kept:
        sums = tape.op(queries * _LSE_BYTES, (), backward, costly=True)
        saves = (q, k, v, sums, *(() if mask is None else (mask,)))
        kept.append(result := tape.op(q.size, (q, k, v), backward, saves=saves, saves_result=True, costly=True))
    return result


def masked_attention(
    tape: Tape, q: Value, k: Value, v: Value, *, queries: int, rows: int, length: int, itemsize: int
) -> Value:
    """Attention confined to documents by a mask of all pairs of tokens in rows of `length`, which is made of ids."""
    pairs = length * length
    with tape.scope() as kept:
        same, ones, lower = tape.new(rows * pairs), tape.new(pairs), tape.new(pairs)
        tape.drop(ones)
        mask = tape.new(rows * pairs)
        tape.drop(same, lower)
        numbers = tape.new(rows * pairs * itemsize)
        kept.append(result := flash_attention(tape, q, k, v, queries=queries, mask=numbers))
        tape.drop(numbers, mask)
    return result
