"""What parallelism adds, on a tape that knows no more than it is asked."""

from dataclasses import dataclass

import pytest

from titan_core.config import ParallelConfig
from titan_core.degrees import resolve_degrees
from titan_core.planning.surroundings import ParallelSurroundings


@dataclass
class Sized:
    size: int


class Tape:
    def __init__(self):
        self.alive = self.most = 0
        self.operations = []

    def new(self, size):
        self.alive += size
        self.most = max(self.most, self.alive)
        return Sized(size)

    def drop(self, *items):
        self.alive -= sum(item.size for item in items)

    def passing(self, *sizes):
        self.drop(*[self.new(size) for size in sizes])

    def share(self, buffer):
        self.alive += buffer.size
        return buffer

    def op(self, size, inputs, backward, *, saves=(), saves_result=False, costly=False, new=True):
        self.operations.append(backward)
        return self.new(size) if new else Sized(size)


def surroundings(**degrees):
    config = ParallelConfig(**degrees)
    world_size = config.tp * config.cp * config.ep
    return ParallelSurroundings(config, resolve_degrees(config, world_size), 2)


def test_nothing_happens_on_one_rank():
    around, tape, x = surroundings(), Tape(), Sized(8)
    assert around.attend(tape, x, x, x, 4) is None
    assert all(method(tape, x) is x for method in (around.enter, around.leave, around.looked_up, around.dispatch))
    assert around.collect(tape, x) is x
    assert tape.most == 0


def test_regions_gather_the_sequence_and_cut_it_again():
    around, tape = surroundings(tp=4), Tape()
    whole = around.enter(tape, Sized(8))
    assert (whole.size, tape.alive, tape.most) == (32, 32, 64)
    part = around.leave(tape, whole)
    assert (part.size, tape.alive) == (8, 40)
    assert [backward(Sized(size))[0].size for backward, size in zip(tape.operations[::2], (32, 8), strict=False)] == [
        8,
        32,
    ]


def test_whole_sequences_are_summed_only():
    around, tape = surroundings(tp=4, sequence_parallel=False), Tape()
    x = around.enter(tape, Sized(8))
    assert (x.size, tape.alive) == (8, 0)
    assert (around.leave(tape, x).size, tape.alive) == (8, 8)


def test_tokens_travel_to_their_experts_and_back():
    around, tape = surroundings(ep=2), Tape()
    arrived = around.dispatch(tape, Sized(8))
    assert (arrived.size, tape.alive) == (8, 16)  # as they came, and sorted
    assert around.collect(tape, arrived).size == 8
    assert tape.alive == 24


@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_ring_holds_keys_and_values_of_two_ranks(itemsize):
    config = ParallelConfig(cp=2)
    around, tape = ParallelSurroundings(config, resolve_degrees(config, 2), itemsize), Tape()
    q, k = Sized(64 * itemsize), Sized(16 * itemsize)
    mixed = around.attend(tape, q, k, k, 8)
    assert (mixed.size, tape.alive) == (q.size, q.size)
    assert tape.most >= 64 * 4 + 2 * 2 * k.size
    assert [gradient.size for gradient in tape.operations[0](mixed)] == [q.size, k.size, k.size]
