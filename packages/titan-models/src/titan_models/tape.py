"""The life of a model's intermediate results, played with sizes alone: no tensor is built, no torch imported.

A program is written as a model's forward is: each operation makes a result, and says what it keeps for its backward and
what that does. A `Tape` counts references as Python and autograd do, and writes down when bytes are taken and given
back. To recompute, it plays the same program a second time.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Event = tuple[str, int]
"""A kind and an amount. `bytes`: so many are allocated, or given back if negative. `gradient`: that of so many elements
of a parameter is computed. `handed`: and handed over to whoever accumulates or reduces it."""

Script = tuple[Event, ...]
Remat = Literal["none", "full", "selective"]


class Played(NamedTuple):
    """What a part of a model does to memory; whoever plays it before hands on its input, and its result's gradient."""

    forward: Script
    """Ends with the result alive, and the input let go of unless it is kept."""
    backward: Script
    """Begins with the result's gradient, which it gives back, and ends with the input's, if there is one."""
    result: int
    """Bytes of the result."""


@dataclass(eq=False)
class Buffer:
    """A storage of so many bytes."""

    size: int
    references: int = 1


@dataclass(eq=False)
class _Node:
    """An operation as autograd remembers it."""

    inputs: "tuple[Value, ...]"
    backward: "Backward"
    saved: list[Buffer] = field(default_factory=list)
    gradient: Buffer | None = None


@dataclass(eq=False)
class Value:
    """A tensor: its storage, and what its gradient flows back to, if it has one."""

    buffer: Buffer
    node: _Node | None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.buffer.size

    @property
    def needs_gradient(self) -> bool:
        """Whether a gradient flows back through it."""
        return self.node is not None


Backward = Callable[[Buffer], Sequence[Buffer | None]]
"""Given the gradient of a result, those of the inputs: storages with a reference for the receiver; None: none."""

Program = Callable[["Tape", Value], Value]


class _EnoughError(Exception):
    """A second forward has made all that the backward needs."""


def play(
    program: Program,
    size: int,
    *,
    needs_gradient: bool = True,
    remat: Remat = "none",
    lent: bool = False,
    gradient_lent: bool = False,
) -> Played:
    """Plays a forward of `program` on an input of `size` bytes, and the backward.

    Args:
        program: a part of a model.
        size: of its input.
        needs_gradient: whether the input needs a gradient.
        remat: `full` keeps the input alone; `selective` keeps what operations call costly too.
        lent: whether the input is in a buffer that lives on.
        gradient_lent: whether the result's gradient is.
    """
    tape = Tape()
    x = Value(Buffer(size, 1 + lent), _Node((), lambda gradient: ()) if needs_gradient else None)
    tape.held.append(x)
    result = tape._forward(program, x, remat)
    forward, tape.events = tuple(tape.events), []
    if result.node is not None:
        result.node.gradient = Buffer(result.size, 1 + gradient_lent)
        tape._backward(program, x, remat)
    return Played(forward, tuple(tape.events), result.size)


class Tape:
    """Plays programs, and writes `events` down."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._nodes: list[_Node] = []
        self.held: list[Value] = []  # by Python's names
        self._mode: Literal["keep", "discard", "cache", "again"] = "keep"
        self._slots: list[_Node] = []  # who keeps the first, the second ... of what is kept
        self._found = 0  # of these, in a second forward
        self._cache: list[Buffer] = []
        self._handing: list[int] = []

    def new(self, size: int) -> Buffer:
        """A storage with one reference."""
        self.events.append(("bytes", size))
        return Buffer(size)

    def plain(self, size: int) -> Value:
        """A value without a gradient, such as indices."""
        self.held.append(value := Value(self.new(size), None))
        return value

    def drop(self, *items: Buffer | Value) -> None:
        """Lets go of a reference to each."""
        for item in items:
            if isinstance(item, Value):
                self.held.remove(item)
            buffer = item.buffer if isinstance(item, Value) else item
            buffer.references -= 1
            if not buffer.references:
                self.events.append(("bytes", -buffer.size))

    def share(self, buffer: Buffer) -> Buffer:
        """`buffer`, with one more reference."""
        buffer.references += 1
        return buffer

    def passing(self, *sizes: int) -> None:
        """Storages that all live at one moment, and no longer."""
        self.events += [("bytes", size) for size in sizes] + [("bytes", -size) for size in sizes]

    def gradient(self, elements: int) -> None:
        """In a backward: that of a parameter is computed; it is handed over when the operation is done."""
        self.events.append(("gradient", elements))
        self._handing.append(elements)

    def op(
        self,
        size: int,
        inputs: Sequence[Value],
        backward: Backward,
        *,
        saves: Sequence[Value | Buffer] = (),
        saves_result: bool = False,
        trains: bool = False,
        costly: bool = False,
        new: bool = True,
    ) -> Value:
        """The result of an operation.

        Args:
            size: its bytes.
            inputs: what it is computed from.
            backward: the gradients of `inputs`, from that of the result.
            saves: what it keeps until then.
            saves_result: whether it keeps the result too.
            trains: whether it has parameters that are trained.
            costly: whether selective recomputation keeps the result.
            new: whether the result has a storage of its own, and is not a view of the first input.
        """
        needed = trains or any(value.needs_gradient for value in inputs)
        node = _Node(tuple(inputs), backward) if needed else None
        if node is not None:
            for item in saves:
                self._save(node, item.buffer if isinstance(item, Value) else item)
        if not new:
            buffer = self.share(inputs[0].buffer)
        elif costly and self._mode == "again" and self._cache:
            buffer = self._cache.pop(0)
        else:
            buffer = self.new(size)
        if costly and self._mode == "cache":
            self._cache.append(self.share(buffer))
        if node is not None:
            if saves_result:
                self._save(node, buffer)
            if self._mode != "again":
                self._nodes.append(node)
        value = Value(buffer, node)
        self.held.append(value)
        return value

    def _save(self, node: _Node, buffer: Buffer) -> None:
        if self._mode == "again":
            if self._found == len(self._slots):
                return
            self._slots[self._found].saved.append(self.share(buffer))
            self._found += 1
            if self._found == len(self._slots):
                raise _EnoughError
            return
        self._slots.append(node)
        if self._mode == "keep":
            node.saved.append(self.share(buffer))

    @contextlib.contextmanager
    def scope(self) -> Iterator[list[Value]]:
        """As the end of a function lets go of its names: of all values made within, but those put into the list."""
        before, kept = list(self.held), []
        yield kept
        self.drop(*(value for value in self.held[:] if value not in before and value not in kept))

    def _forward(self, program: Program, x: Value, remat: Remat) -> Value:
        modes: dict[Remat, Literal["keep", "discard", "cache"]] = {"full": "discard", "selective": "cache"}
        self._mode = modes.get(remat, "keep")
        with self.scope() as kept:
            result = program(self, x)
            kept.append(result)
        if remat != "none":
            self.share(x.buffer)  # all that the second forward needs
        if x in self.held:
            self.drop(x)
        return result

    def _backward(self, program: Program, x: Value, remat: Remat) -> None:
        if remat != "none":
            self._mode = "again"
            self.held = [again := Value(self.share(x.buffer), x.node)]
            with contextlib.suppress(_EnoughError):
                program(self, again)
            self.drop(*list(self.held))
        for node in reversed(self._nodes):
            if node.gradient is None:
                continue
            gradients = node.backward(node.gradient)
            self.drop(*node.saved, node.gradient)
            self.events += [("handed", elements) for elements in self._handing]
            self._handing.clear()
            for value, gradient in zip(node.inputs, gradients, strict=True):
                self._accumulate(value, gradient)
        if remat != "none":
            self.drop(x.buffer, *self._cache)

    def _accumulate(self, value: Value, gradient: Buffer | None) -> None:
        if gradient is None:
            return
        if value.node is None:
            self.drop(gradient)
        elif value.node.gradient is None:
            value.node.gradient = gradient
        else:
            total = self.new(value.size)
            self.drop(value.node.gradient, gradient)
            value.node.gradient = total
