import pytest

from titan_core.config import ParallelConfig
from titan_core.pipelining.schedule_order import compute_order
from titan_core.pipelining.stages import SCHEDULES
from titan_core.planning.timeline import DeadlockError, draw, most_in_flight, play


def order(schedule, micro_batches=8, pp=4):
    return compute_order(ParallelConfig(pp=pp, pp_schedule=schedule), micro_batches)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_stage_computes_every_micro_batch_once_and_after_what_it_needs(schedule):
    timeline = play(order(schedule))
    ends = {slot.computation: slot.end for slots in timeline.ranks for slot in slots}
    starts = {slot.computation: slot.start for slots in timeline.ranks for slot in slots}
    stages = 4 * SCHEDULES[schedule].stages_per_rank
    assert len(ends) == sum(len(slots) for slots in timeline.ranks)
    for stage in range(stages):
        for batch in range(8):
            assert ((stage, "B", batch) in ends) != ((stage, "I", batch) in ends and (stage, "W", batch) in ends)
            backward = (stage, "B", batch) if (stage, "B", batch) in ends else (stage, "I", batch)
            assert ends[stage, "F", batch] <= starts[backward]
            if stage:
                assert ends[stage - 1, "F", batch] <= starts[stage, "F", batch]
                before = [(stage - 1, kind, batch) for kind in "BI" if (stage - 1, kind, batch) in starts]
                assert ends[backward] <= starts[before[0]]


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
def test_the_bubble_is_that_of_the_formula(schedule):
    # arXiv 2104.04473, section 2.2: (p - 1) / m of the ideal time.
    assert play(order(schedule)).bubble == pytest.approx(3 / (8 + 3))


def test_splitting_the_backward_fills_the_bubble():
    assert play(order("ZBVZeroBubble")).bubble < play(order("Interleaved1F1B")).bubble < play(order("1F1B")).bubble


def test_in_flight_micro_batches_of_1f1b_fall_from_rank_to_rank():
    weights = dict.fromkeys(range(8), 1.0)
    assert [most_in_flight(actions, weights) for actions in order("1F1B").values()] == [4, 3, 2, 1]
    assert [most_in_flight(actions, weights) for actions in order("GPipe").values()] == [8] * 4
    # A backward in parts is over with that of the weights.
    assert most_in_flight([(0, "F", 0), (0, "I", 0), (0, "F", 1), (0, "W", 0)], weights) == 2


def test_a_schedule_from_a_file_is_drawn(tmp_path):
    path = tmp_path / "schedule.csv"
    path.write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    timeline = play(compute_order(ParallelConfig(pp=2, pp_schedule_csv=str(path)), 2))
    assert draw(timeline) == [
        "pp rank 0 F0 F1 .. .. B0 -- .. B1 --",
        "pp rank 1 .. F0 B0 -- F1 B1 -- .. ..",
    ]
    assert timeline.bubble == pytest.approx(6 / 18)


def test_a_drawing_is_cut_to_its_width():
    *rows, note = draw(play(order("Interleaved1F1B")), 60)
    assert max(map(len, rows)) <= 60
    assert rows[1].startswith("pp rank 1 ... 1F0 1F1 1F2 1F3 5F0")
    assert note == "... the first 12 of 57 units of time"


def test_a_schedule_that_waits_for_itself_is_refused():
    with pytest.raises(DeadlockError, match=r"never ends: pp rank 0 at 0B0 for 0F0; pp rank 1 at 1B0 for 1F0\. Mend"):
        play({0: [(0, "B", 0), (0, "F", 0)], 1: [(1, "B", 0), (1, "F", 0)]})
