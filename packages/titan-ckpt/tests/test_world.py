import threading

import pytest
import torch.distributed as dist

from ranks import run_ranks
from titan_ckpt.errors import CheckpointError
from titan_ckpt.world import RanksFailedError, World


def test_one_process_needs_no_process_group() -> None:
    world = World()
    assert (world.rank, world.size) == (0, 1)
    assert world.gather(5) == [5]
    assert world.gather_distinct({"a": 1}) == [{"a": 1}]
    assert world.together(lambda: 6) == 6
    assert world.first(lambda: 7) == 7
    assert world.gather_first(8) == [8]
    assert world.deal(lambda: [9]) == 9
    with pytest.raises(RanksFailedError, match=r"^ZeroDivisionError: ") as raised:
        world.together(lambda: 1 / 0)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_every_rank_gets_what_all_or_rank_0_have() -> None:
    def talk() -> tuple[list[int], list[str], int]:
        world = World()
        return world.gather(world.rank), world.gather_distinct("ab"[world.rank % 2]), world.first(lambda: world.rank)

    assert run_ranks(3, talk) == [([0, 1, 2], ["a", "b"], 0)] * 3


def test_rank_0_collects_and_deals() -> None:
    def talk() -> tuple[list[int], int]:
        world = World(dist.new_group(backend="gloo"))
        values = world.gather_first(world.rank)
        return values, world.deal(lambda: [10 + value for value in values])

    assert run_ranks(3, talk) == [([0, 1, 2], 10), ([], 11), ([], 12)]


def test_two_threads_talk_at_once_over_groups_of_their_own() -> None:
    def talk() -> bool:
        world, other = World(), World(dist.new_group(backend="gloo"))
        heard: list[list[int]] = []
        thread = threading.Thread(target=lambda: heard.extend(other.gather(number) for number in range(50)))
        thread.start()
        mine = [world.gather(-number) for number in range(50)]
        thread.join()
        return mine == [[-number] * 2 for number in range(50)] and heard == [[number] * 2 for number in range(50)]

    assert run_ranks(2, talk) == [True, True]


def test_a_failure_on_any_rank_is_the_same_error_on_every_rank() -> None:
    def fail() -> list[str]:
        world = World()

        def together() -> None:
            if world.rank:
                raise CheckpointError("no room")

        def first() -> None:
            raise OSError(28, "No space left on device", "/x")

        messages = []
        for method, action in ((world.together, together), (world.first, first), (world.deal, first)):
            with pytest.raises(RanksFailedError) as raised:
                method(action)
            messages.append(str(raised.value))
        return messages

    full = "rank 0: [Errno 28] No space left on device: '/x'"
    message = ["rank 1, 2: no room", full, full]
    assert run_ranks(3, fail) == [message] * 3


def test_many_ranks_are_counted_not_listed() -> None:
    error = RanksFailedError(dict.fromkeys(range(64), "gone"), 64)
    assert str(error) == "rank 0, 1, 2 and 61 more: gone"
