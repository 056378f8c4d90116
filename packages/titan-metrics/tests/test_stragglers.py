import pytest

from titan_metrics.stragglers import Phase, find_stragglers, summary


def phases(seconds, steps=10):
    """`seconds(rank, step)` for each phase: what four ranks take."""
    return [
        Phase(rank, step, name, of(rank, step))
        for name, of in seconds.items()
        for rank in range(4)
        for step in range(steps)
    ]


def test_the_slow_rank_and_its_phase_are_named():
    found = find_stragglers(
        phases({"data_wait": lambda rank, step: 0.01, "compute": lambda rank, step: 0.1 + 0.05 * (rank == 2)})
    )
    (straggler,) = found
    assert (straggler.rank, straggler.phase, straggler.steps, straggler.of_steps) == (2, "compute", 10, 10)
    assert straggler.seconds == pytest.approx(0.05)
    assert straggler.typical == pytest.approx(0.1)
    assert summary(found) == (
        "rank 2 is slow in compute: 50.0 ms a step more than the ranks' median of 100.0 ms, in 10 of 10 steps"
    )


def test_one_slow_step_is_no_straggler():
    assert find_stragglers(phases({"compute": lambda rank, step: 5.0 if (rank, step) == (1, 3) else 0.1})) == []


def test_a_difference_that_no_step_feels_is_none():
    seconds = {"compute": lambda rank, step: 1.0, "log": lambda rank, step: 0.002 + 0.01 * (rank == 0)}
    assert find_stragglers(phases(seconds)) == []
    assert [found.rank for found in find_stragglers(phases(seconds), share=0.005)] == [0]
    assert summary([]) == "No rank is slower than the others."


def test_the_slowest_comes_first():
    found = find_stragglers(
        phases({"a": lambda rank, step: 1 + 0.5 * (rank == 3), "b": lambda rank, step: 1 + 0.9 * (rank == 1)})
    )
    assert [(one.rank, one.phase) for one in found] == [(1, "b"), (3, "a")]


def test_nothing_to_compare_is_no_straggler():
    assert find_stragglers([]) == []
    assert find_stragglers([Phase(0, step, "compute", 1.0 + step) for step in range(5)]) == []
