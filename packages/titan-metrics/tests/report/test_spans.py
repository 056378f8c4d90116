import json

import pytest

from recorded_runs import write_spans
from titan_metrics.report import spans as spans_module
from titan_metrics.report.files import ReportError
from titan_metrics.report.spans import RunSpans


def test_the_slow_rank_and_its_phase_are_named(tmp_path):
    write_spans(tmp_path, slow=2)
    spans = RunSpans.read(tmp_path / "spans", None)
    (straggler,) = spans.stragglers
    assert (straggler.rank, straggler.phase) == (2, "data_wait")
    assert straggler.seconds == pytest.approx(0.05)
    assert spans.means["data_wait"] == pytest.approx({0: 0.005, 1: 0.005, 2: 0.055, 3: 0.005})
    assert spans.means["forward_backward"] == pytest.approx(dict.fromkeys(range(4), 0.08))  # waits left out


def test_only_steps_that_all_ranks_have_count(tmp_path):
    write_spans(tmp_path, ranks=2, steps=range(1, 6))
    path = tmp_path / "spans/rank-1.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if '"step": 5' not in line) + "\n")
    assert RunSpans.read(tmp_path / "spans", None).steps == [1, 2, 3, 4]


def test_a_window_of_steps_can_be_named(tmp_path):
    write_spans(tmp_path, ranks=2, steps=range(1, 101))
    assert RunSpans.read(tmp_path / "spans", (5, 7)).steps == [5, 6, 7]
    assert RunSpans.read(tmp_path / "spans", None).steps == list(range(77, 101))


def test_of_a_long_file_only_its_end_is_read_and_its_start_is_found(tmp_path, monkeypatch):
    write_spans(tmp_path, ranks=1, steps=range(1, 201))
    whole = RunSpans.read(tmp_path / "spans", None)
    monkeypatch.setattr(spans_module, "_FIRST_BYTES", 1024)
    monkeypatch.setattr(spans_module, "_RANK_BYTES", (4096, 4096))
    monkeypatch.setattr(spans_module, "_CHUNK", 500)
    end = RunSpans.read(tmp_path / "spans", None)
    assert 2 < len(end.steps) < 24
    assert end.by_rank[0] == whole.by_rank[0][-5 * len(end.steps) :]  # whole steps of five spans


def test_as_much_of_a_file_is_read_as_its_steps_are_long(tmp_path, monkeypatch):
    write_spans(tmp_path, ranks=1, steps=range(1, 201))
    monkeypatch.setattr(spans_module, "_FIRST_BYTES", 1024)
    assert RunSpans.read(tmp_path / "spans", None).steps == list(range(177, 201))


def test_of_a_step_that_was_done_again_the_last_time_counts(tmp_path):
    write_spans(tmp_path, ranks=2, steps=[1, 2, 3])
    path = tmp_path / "spans/rank-0.jsonl"
    first, *_ = path.read_text().splitlines()
    path.write_text(path.read_text().replace(first, json.dumps(json.loads(first) | {"start": 1000.0, "process": 1})))
    write_spans(tmp_path, ranks=2, steps=[3, 4])
    spans = RunSpans.read(tmp_path / "spans", None)
    assert spans.steps == [1, 2, 3, 4]
    assert {span.step for span in spans.by_rank[0] if span.process.number == 1} == {1, 2}
    assert spans.step_seconds(3) < 10


def test_ranks_that_the_newest_start_does_not_have_do_not_count(tmp_path):
    write_spans(tmp_path, ranks=2, steps=range(1, 12), slow=1)
    write_spans(tmp_path, ranks=1, steps=range(10, 61))
    spans = RunSpans.read(tmp_path / "spans", None)
    assert (list(spans.by_rank), spans.steps, spans.stragglers) == ([0], list(range(37, 61)), [])
    assert RunSpans.read(tmp_path / "spans", (55, 60)).steps == list(range(55, 61))
    before = RunSpans.read(tmp_path / "spans", (3, 5))  # both did them then
    assert (list(before.by_rank), before.steps) == ([0, 1], [3, 4, 5])
    assert before.stragglers[0].rank == 1


def test_a_rank_of_the_newest_start_that_has_no_step_yet_is_waited_for(tmp_path):
    write_spans(tmp_path, ranks=2, steps=[1, 2])
    lines = (tmp_path / "spans/rank-1.jsonl").read_text().splitlines()
    (tmp_path / "spans/rank-1.jsonl").write_text(lines[0] + "\n")
    assert RunSpans.read(tmp_path / "spans", None).steps == []


def test_clocks_are_laid_on_that_of_rank_0(tmp_path):
    write_spans(tmp_path, ranks=2, steps=[1])
    path = tmp_path / "spans/rank-1.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {"clock_offset": 100.0}), *rest]) + "\n")
    by_rank = RunSpans.read(tmp_path / "spans", None).by_rank
    assert by_rank[0][0].start - by_rank[1][0].start == pytest.approx(100, abs=5)


def test_the_slowest_step_is_found(tmp_path):
    write_spans(tmp_path, ranks=1, steps=[1, 2])
    spans = RunSpans.read(tmp_path / "spans", None)
    assert spans.step_seconds(1) == pytest.approx(0.165, abs=1e-3)


def test_no_folder_is_no_spans(tmp_path):
    spans = RunSpans.read(tmp_path / "spans", None)
    assert spans.steps == []
    assert spans.stragglers == []


def test_what_is_no_file_of_spans_is_an_error(tmp_path):
    (tmp_path / "rank-0.jsonl").write_text(
        '{"start": 1.0, "rank": 0, "host": "a", "process": 1, "world_size": 1}\n{"name": "x"}\n'
    )
    with pytest.raises(ReportError, match=r"rank-0\.jsonl has a line that is no span \('step'\)"):
        RunSpans.read(tmp_path, None)
    (tmp_path / "rank-0.jsonl").rename(tmp_path / "rank-x.jsonl")
    with pytest.raises(ReportError, match=r"is not named rank-N\.jsonl"):
        RunSpans.read(tmp_path, None)
