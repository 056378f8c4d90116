"""A schedule from a file is read as it was meant, and refused, by file, line and action, if it cannot run."""

import pytest

from titan_core.config import ParallelConfig
from titan_core.pipelining.schedule_file import read_schedule
from titan_core.pipelining.schedule_order import compute_order
from titan_core.pipelining.stages import PipelineError


@pytest.fixture
def schedule(tmp_path):
    def write(*lines, begin=b"", end=b"\n"):
        path = tmp_path / "schedule.csv"
        path.write_bytes(begin + "\n".join(lines).encode() + end)
        return read_schedule(str(path))

    return write


ONE_F_ONE_B = ("0F0,0F1,0B0,0B1", "1F0,1B0,1F1,1B1")

IMPOSSIBLE = {
    "a backward before its forward": (
        ("0B0,0F0,0F1,0B1", "1F0,1B0,1F1,1B1"),
        "line 1: 0B0 stands before 0F0, but a forward comes before its backward; change their order.",
    ),
    "half a backward before its forward": (
        ("0F0,0F1,0I0,0W0,0B1", "1F0,1I1,1F1,1W1,1B0"),
        "line 2: 1I1 stands before 1F1, but a forward comes before its backward; change their order.",
    ),
    "gradients of weights before those of activations": (
        ("0F0,0F1,0W0,0I0,0I1,0W1", "1F0,1I0,1F1,1I1,1W0,1W1"),
        "line 1: 0W0 stands before 0I0, but the gradients of activations (I) come before those of weights (W); change "
        "their order.",
    ),
    "ranks that wait for each other": (
        ("0F0,0B0,0F1,0B1", "1F0,1F1,1B0,1B1"),
        "never ends, because ranks wait for each other: line 1 at 0B0 for 1B0 of line 2, line 2 at 1F1 for 0F1 of line "
        "1. A forward needs that of the stage before, a backward that of the stage after; change the order.",
    ),
    "what torch does not run": (
        ("0F0,0F1,0B0,0B1", "1F1,1B1,1F0,1B0"),
        "line 2: 1F1 stands before 1F0, but torch runs the forwards of the last stage in the order of their "
        "micro-batches only; change their order.",
    ),
    "both, which is said of the first": (
        ("0F0,0B0,0F1,0B1", "1F1,1F0,1B0,1B1"),
        "line 2: 1F1 stands before 1F0",
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_orders_are_refused_by_line_and_action(schedule, name):
    lines, message = IMPOSSIBLE[name]
    file = schedule(*lines)
    (problem,) = file.problems(pp=2, stages=2, micro_batches=2)
    assert problem.startswith(file.path)
    assert message in problem
    with pytest.raises(PipelineError) as refused:
        compute_order(ParallelConfig(pp=2, pp_schedule_csv=file.path), 2)
    assert str(refused.value) == problem


def test_each_line_has_its_own_problem(schedule):
    found = schedule("0B0,0F0", "1B0,1F0").problems(pp=2, stages=2, micro_batches=1)
    assert ["line 1: 0B0" in found[0], "line 2: 1B0" in found[1], len(found)] == [True, True, 2]


def test_a_rank_may_wait_for_itself(schedule):
    (problem,) = schedule("1F0,0F0,1B0,0B0").problems(pp=1, stages=2, micro_batches=1)
    assert "line 1 at 1F0 for 0F0 of line 1" in problem


def test_a_backward_in_parts_is_waited_for(schedule):
    (problem,) = schedule("0F0,0B0,0F1,0B1", "1F0,1F1,1I0,1W0,1B1").problems(pp=2, stages=2, micro_batches=2)
    assert "line 1 at 0B0 for 1I0 of line 2" in problem


@pytest.mark.parametrize(
    "spelling",
    [
        {"end": b""},
        {"end": b"\n\n"},
        {"end": b"\r\n , ,\r\n\n"},
        {"begin": b"\xef\xbb\xbf"},
    ],
)
def test_byte_order_marks_and_blank_last_lines_mean_nothing(schedule, spelling):
    plain, spelt = schedule(*ONE_F_ONE_B).rows, schedule(*ONE_F_ONE_B, **spelling)
    assert spelt.rows == plain
    assert spelt.problems(pp=2, stages=2, micro_batches=2) == []
    # What torch runs is what was read.
    order = compute_order(ParallelConfig(pp=2, pp_schedule_csv=spelt.path), 2)
    assert [tuple(actions) for actions in order.values()] == list(plain)


def test_spaces_and_empty_cells_mean_nothing(schedule):
    assert schedule(" 0F0 ,,0B0").rows == (((0, "F", 0), (0, "B", 0)),)
