import threading

import pytest

from titan_ckpt.errors import CheckpointError
from titan_ckpt.flight import Flight


def test_it_goes_on_while_the_caller_does() -> None:
    going, done = threading.Event(), []
    flight = Flight(lambda: (going.wait(10), done.append(1)))
    assert done == []
    going.set()
    flight.land()
    assert done == [1]
    assert not flight.failed


@pytest.mark.parametrize("error", [CheckpointError("no room"), RuntimeError("no room"), KeyboardInterrupt("no room")])
def test_any_end_but_a_good_one_is_a_checkpoint_error(error: BaseException) -> None:
    def fail() -> None:
        raise error

    flight = Flight(fail)
    flight.join()
    assert flight.failed
    with pytest.raises(CheckpointError, match="no room"):
        flight.land()
