import pytest

from titan_ckpt.cadence import Timer, due
from titan_ckpt.config import CheckpointConfig


def saves(config: CheckpointConfig, last: int = 12) -> dict[int, str]:
    """What is saved after which of the steps up to the last."""
    found = {step: due(config, step, is_last=step == last, is_time=False) for step in range(1, last + 1)}
    return {step: save for step, save in found.items() if save}


def test_the_last_step_is_always_saved() -> None:
    assert saves(CheckpointConfig()) == {12: "passing"}
    assert saves(CheckpointConfig(every=0)) == {12: "passing"}
    assert saves(CheckpointConfig(enabled=False, every=1, permanent_every=1, permanent_steps=(3,))) == {}


def test_passing_and_permanent_ones_have_their_own_steps() -> None:
    config = CheckpointConfig(every=4, permanent_every=6, permanent_steps=(1, 4))
    assert saves(config) == {1: "permanent", 4: "permanent", 6: "permanent", 8: "passing", 12: "permanent"}


def test_time_makes_a_passing_one_due() -> None:
    config = CheckpointConfig(every=0, permanent_steps=(5,))
    assert due(config, 4, is_last=False, is_time=True) == "passing"
    assert due(config, 5, is_last=False, is_time=True) == "permanent"
    assert due(config, 6, is_last=False, is_time=False) is None


def test_the_timer_counts_minutes_from_one_save_to_the_next() -> None:
    now = 1000.0
    timer = Timer(CheckpointConfig(every_minutes=1.5), clock=lambda: now)
    now += 89.9
    assert not timer.is_time()
    now += 0.1
    assert timer.is_time()
    assert timer.is_time()  # until somebody has saved
    timer.restart()
    assert not timer.is_time()


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_without_minutes_it_is_never_time(seconds: float) -> None:
    clock = iter([0.0, seconds])
    assert not Timer(CheckpointConfig(), clock=lambda: next(clock)).is_time()
