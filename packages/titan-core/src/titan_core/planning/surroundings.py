"""What parallelism adds to the life of activations, for whoever plays a model with sizes. Imports no torch.

Each method mirrors what `titan_core.tensor`, `titan_core.context` or `titan_core.expert` does at that place. The
player's tape is asked to

    tape.new(size)           make a buffer of so many bytes
    tape.drop(*items)        let go of buffers or values
    tape.passing(*sizes)     make buffers that live for a moment
    tape.share(buffer)       count one more reference
    tape.op(size, inputs, backward, saves=, saves_result=, costly=, new=)
                             make the result of an operation, a value with a `size`; `backward` gets the buffer of its
                             gradient, and makes those of the inputs' gradients
"""

from collections.abc import Sequence
from typing import Any

from titan_core.config import ParallelConfig
from titan_core.degrees import Degrees

Gradients = Sequence[Any]


class ParallelSurroundings:
    """Of one layout."""

    def __init__(self, config: ParallelConfig, degrees: Degrees, itemsize: int) -> None:
        """`itemsize`: bytes of an element of activations."""
        self._config, self._degrees, self._itemsize = config, degrees, itemsize
        self._cut = degrees.tp > 1 and config.sequence_parallel

    def enter(self, tape: Any, x: Any) -> Any:
        """The sequence is gathered; without sequence parallelism only the gradient is summed."""
        whole, part = x.size * self._degrees.tp, x.size
        if self._degrees.tp == 1:
            return x
        if not self._cut:

            def summed(gradient: Any) -> Gradients:
                result = tape.new(part)
                tape.passing(part)
                return (result,)

            return tape.op(part, (x,), summed, new=False)
        gathered = tape.op(whole, (x,), lambda gradient: (_scattered(tape, whole, part),))
        tape.passing(whole)
        joined = tape.op(whole, (gathered,), lambda gradient: (tape.share(gradient),))
        tape.drop(gathered)
        return joined

    def leave(self, tape: Any, x: Any) -> Any:
        """Each rank's share of a sum is summed, and cut along the sequence again."""
        whole, part = x.size, x.size // self._degrees.tp
        if self._degrees.tp == 1:
            return x
        if not self._cut:
            result = tape.op(whole, (x,), lambda gradient: (tape.share(gradient),), costly=True)
            tape.passing(whole)
            return result
        chunks = tape.new(whole)
        scattered = tape.op(part, (x,), lambda gradient: (_gathered(tape, whole),), costly=True)
        tape.passing(part)
        tape.drop(chunks)
        return scattered

    def looked_up(self, tape: Any, x: Any) -> Any:
        """Rows of the vocabulary that other ranks have are set to zero."""
        if self._degrees.tp == 1:
            return x
        return tape.op(x.size, (x,), lambda gradient: (tape.new(x.size),))

    def attend(self, tape: Any, q: Any, k: Any, v: Any, queries: int) -> Any:
        """Around the ring of context parallelism, or None; `queries`: those of each head counted."""
        if self._degrees.cp == 1:
            return None
        step = max(self._itemsize, 4)
        pair, exactly = 2 * k.size, q.size // self._itemsize * step
        chunk = q.size // 2 if self._config.cp_load_balance else q.size

        def backward(gradient: Any) -> Gradients:
            of_queries, held, received = tape.new(exactly), tape.new(pair), tape.new(pair)
            of_held, on_its_way = (tape.new(pair // self._itemsize * step) for _ in range(2))
            tape.passing(chunk, pair // 2)
            tape.drop(held, received, of_held)
            results = tuple(tape.new(x.size) for x in (q, k, v))
            tape.drop(of_queries, on_its_way)
            return results

        exact, sums = tape.new(exactly), tape.new(queries * step)
        held, received = tape.new(pair), tape.new(pair)
        tape.passing(chunk, chunk // self._itemsize * step)
        tape.drop(held)
        if step == self._itemsize:
            tape.drop(exact)  # it is the result
        mixed = tape.op(q.size, (q, k, v), backward, saves=(q, k, v, sums), saves_result=True)
        tape.drop(*(() if step == self._itemsize else (exact,)), received, sums)
        return mixed

    def dispatch(self, tape: Any, x: Any) -> Any:
        """Tokens travel to their experts, and are sorted there."""
        if self._degrees.ep == 1:
            return x
        return self._permuted(tape, self._exchanged(tape, x))

    def collect(self, tape: Any, x: Any) -> Any:
        """And back."""
        if self._degrees.ep == 1:
            return x
        permuted = self._permuted(tape, x)
        result = self._exchanged(tape, permuted)
        tape.drop(permuted)
        return result

    def _exchanged(self, tape: Any, x: Any) -> Any:
        size = x.size

        def back(gradient: Any) -> Gradients:
            result = tape.new(size)
            tape.passing(size)
            return (result,)

        result = tape.op(size, (x,), back, costly=True)
        tape.passing(size)
        return result

    def _permuted(self, tape: Any, x: Any) -> Any:
        return tape.op(x.size, (x,), lambda gradient: (tape.new(x.size),))


def _scattered(tape: Any, whole: int, part: int) -> Any:
    chunks, result = tape.new(whole), tape.new(part)
    tape.passing(part)
    tape.drop(chunks)
    return result


def _gathered(tape: Any, whole: int) -> Any:
    received = tape.new(whole)
    tape.passing(whole)
    result = tape.new(whole)
    tape.drop(received)
    return result
