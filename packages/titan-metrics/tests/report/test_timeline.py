import pytest

from recorded_runs import write_metrics, write_spans
from titan_metrics.report.run import open_runs
from titan_metrics.report.timeline import timelines


def test_each_rank_has_a_row_with_its_spans(make_run):
    (line,) = timelines(open_runs([make_run(slow=2)]))
    assert line.ranks == [0, 1, 2, 3]
    assert line.windows[0].title == "Steps 58 to 60, the latest"
    rank, blocks = line.windows[0].rows[0]
    assert rank == 0
    assert len(blocks) == 3 * 5  # data, forward and backward with two micro-batches in it, optimizer
    assert all(block.left >= 0 and block.left + block.width <= 100.01 for block in blocks)
    texts = [block.text for block in blocks]
    assert "forward_backward of step 58, 130 ms, 50 ms of it waiting" in texts
    assert "forward of step 58, 40 ms, micro-batch 1" in texts


def test_the_table_shows_who_is_above_the_median(make_run):
    (line,) = timelines(open_runs([make_run(slow=2)]))
    phases = {phase.name: phase.cells for phase in line.phases}
    assert phases["data_wait"] == [("5 ms", 0.0), ("5 ms", 0.0), ("55 ms", 1.0), ("5 ms", 0.0)]
    assert {excess for _, excess in phases["optimizer"]} == {0.0}
    assert [straggler.rank for straggler in line.stragglers] == [2]


def test_of_many_ranks_the_slow_one_is_among_those_shown(tmp_path):
    write_metrics(tmp_path, [1])
    write_spans(tmp_path, ranks=40, slow=38, steps=range(1, 4))
    (line,) = timelines(open_runs([tmp_path]))
    assert len(line.ranks) == 32
    assert 38 in line.ranks
    assert line.left_out == 8


def test_the_slowest_step_has_a_window_of_its_own(tmp_path):
    write_metrics(tmp_path, [1])
    write_spans(tmp_path, ranks=2, steps=range(1, 9))
    path = tmp_path / "spans/rank-0.jsonl"
    path.write_text(path.read_text().replace('"step": 2, "at": 0.165', '"step": 2, "at": -3.0'))
    (line,) = timelines(open_runs([tmp_path]))
    assert [window.title for window in line.windows] == [
        "Steps 6 to 8, the latest",
        "Step 2, the slowest of steps 1 to 8",
    ]


@pytest.mark.parametrize("blocks", [10, 10_000])
def test_too_many_spans_are_thinned_by_depth(make_run, monkeypatch, blocks):
    monkeypatch.setattr("titan_metrics.report.timeline._BLOCKS", blocks)
    (line,) = timelines(open_runs([make_run()]))
    assert line.windows[0].depths == (1 if blocks == 10 else 2)


def test_a_run_without_spans_has_none(bare_run):
    assert timelines(open_runs([bare_run])) == []
