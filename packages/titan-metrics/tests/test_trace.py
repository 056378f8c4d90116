import json

import pytest

from titan_metrics.spans import Spans
from titan_metrics.trace import SpansError, chrome_trace, main, phases, read_spans

WHOLE = '{"name": "a", "step": 1, "at": 0.0, "seconds": 1.0, "depth": 0}'


def write(run, rank, *lines, start=1000.0, offset=None, world_size=3):
    path = run / "spans" / f"rank-{rank}.jsonl"
    path.parent.mkdir(exist_ok=True)
    header = {"start": start, "rank": rank, "host": "h", "process": 7, "world_size": world_size, "clock_offset": offset}
    with path.open("a") as file:
        for line in (header, *lines):
            file.write(json.dumps(line) + "\n")


def span(name, step, at, seconds, depth=0, **attributes):
    return {"name": name, "step": step, "at": at, "seconds": seconds, "depth": depth, **attributes}


def test_ranks_share_one_timeline_on_the_clock_of_rank_0(tmp_path):
    write(tmp_path, 0, span("a", 1, 0.5, 0.1))
    write(tmp_path, 1, span("a", 1, 0.5, 0.2), start=1060.0, offset=60.0)
    starts = [found.start for found in read_spans(tmp_path)]
    assert starts == [1000.5, 1000.5]
    events = chrome_trace(read_spans(tmp_path))["traceEvents"]
    drawn = [event for event in events if event["ph"] == "X"]
    assert [(event["pid"], event["ts"], event["dur"], event["args"]) for event in drawn] == [
        (0, 0.0, 100_000.0, {"step": 1}),
        (1, 0.0, 200_000.0, {"step": 1}),
    ]
    names = {(event["name"], event["pid"]): event["args"] for event in events if event["ph"] == "M"}
    assert names["process_name", 1] == {"name": "rank 1 (h)"}
    assert names["process_sort_index", 1] == {"sort_index": 1}


def test_stages_and_threads_have_tracks_of_their_own(tmp_path):
    write(
        tmp_path,
        0,
        span("forward_backward", 1, 0.0, 1.0),
        span("F", 1, 0.1, 0.2, 1, stage=0, micro_batch=0),
        span("F", 1, 0.3, 0.2, 1, stage=2, micro_batch=0),
        span("read", 1, 0.0, 0.1, 0, thread="prefetch"),
    )
    events = chrome_trace(read_spans(tmp_path))["traceEvents"]
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert sorted(tracks.values()) == ["prefetch", "stage 0", "stage 2", "training"]
    drawn = {(event["name"], tracks[event["tid"]]) for event in events if event["ph"] == "X"}
    assert drawn == {("forward_backward", "training"), ("F", "stage 0"), ("F", "stage 2"), ("read", "prefetch")}


def test_a_restarted_rank_and_a_torn_line_are_read(tmp_path):
    write(tmp_path, 0, span("a", 1, 0.0, 1.0))
    with (tmp_path / "spans/rank-0.jsonl").open("a") as file:
        file.write('{"name": "to\n')
    write(tmp_path, 0, span("b", 2, 0.0, 1.0), start=2000.0)
    assert [(found.name, found.start) for found in read_spans(tmp_path)] == [("a", 1000.0), ("b", 2000.0)]
    assert [found.name for found in read_spans(tmp_path, range(2, 5))] == ["b"]


def test_phases_are_outermost_and_without_waits(tmp_path):
    write(
        tmp_path,
        0,
        span("a", 1, 0.0, 1.0, waited=0.75),
        span("a", 1, 1.0, 0.5),
        span("inner", 1, 0.0, 1.0, 1),
        span("read", 1, 0.0, 1.0, 0, thread="io"),
        span("start", None, 0.0, 1.0),
    )
    assert phases(read_spans(tmp_path)) == [(0, 1, "a", 0.75)]


def test_the_command_writes_a_trace_and_names_slow_ranks(tmp_path, capsys):
    for rank in range(3):
        write(tmp_path, rank, *(span("compute", step, step, 0.1 + 0.05 * (rank == 1)) for step in range(10)))
    assert main([str(tmp_path), "--steps", "2", "5"]) == 0
    out = capsys.readouterr().out
    assert "12 spans in" in out
    assert "rank 1 is slow in compute: 50.0 ms" in out
    assert "in 4 of 4 steps" in out
    assert len(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]) == 12 + 9
    assert main([str(tmp_path), "--threshold", "0.6", "--output", str(tmp_path / "other.json")]) == 0
    assert "No rank is slower" in capsys.readouterr().out
    assert (tmp_path / "other.json").exists()


def test_the_summary_is_of_the_ranks_that_the_newest_start_has(tmp_path, capsys):
    for rank in range(3):
        write(tmp_path, rank, *(span("compute", step, step, 0.1 + 0.05 * (rank == 2)) for step in range(10)))
    for rank in range(2):
        slow = 0.03 * (rank == 0)
        write(tmp_path, rank, *(span("compute", s, s, 0.1 + slow) for s in range(8, 20)), start=2000.0, world_size=2)
    assert main([str(tmp_path)]) == 0
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert line.startswith("rank 0 is slow in compute: ")
    assert {event["pid"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]} == {0, 1, 2}


def test_steps_that_no_rank_has_are_told(tmp_path, capsys):
    write(tmp_path, 0, span("a", 1, 0.0, 1.0))
    assert main([str(tmp_path), "--steps", "55", "60"]) == 1
    assert "has spans, but none of steps 55 to 60" in capsys.readouterr().err
    assert not (tmp_path / "trace.json").exists()


def test_no_spans_are_told_with_a_remedy(tmp_path, capsys):
    with pytest.raises(SpansError, match=r"--spans\.enabled"):
        list(read_spans(tmp_path))
    assert main([str(tmp_path)]) == 1
    assert "titan-trace: " in (told := capsys.readouterr().err)
    assert "has no spans" in told


@pytest.mark.parametrize(
    ("line", "flags", "code", "message"),
    [
        ('{"name": "a"}', [], 1, "rank-0.jsonl has a line that is no span"),
        ('{"name": "a', [], 1, "rank-0.jsonl, line 3, is not a JSON object"),
        (WHOLE, ["--output", "{here}/absent/trace.json"], 1, "Cannot write {here}/absent/trace.json"),
        (WHOLE, ["--steps", "5", "2"], 2, "the first step comes after the last"),
    ],
)
def test_a_mistake_is_one_paragraph(line, flags, code, message, tmp_path, capsys):
    with Spans(tmp_path / "spans/rank-0.jsonl") as spans, spans.span("a"):
        pass
    with (tmp_path / "spans/rank-0.jsonl").open("a") as file:
        file.write(line + "\n" + (tmp_path / "spans/rank-0.jsonl").read_text().splitlines()[1] + "\n")
    try:
        found = main([str(tmp_path), *(flag.format(here=tmp_path) for flag in flags)])
    except SystemExit as ended:
        found = ended.code
    assert found == code
    assert message.format(here=tmp_path) in capsys.readouterr().err


def test_what_spans_write_is_what_is_read(tmp_path):
    with Spans(tmp_path / "spans/rank-0.jsonl") as spans:
        spans.step = 3
        with spans.span("a", note="x"):
            pass
    (found,) = read_spans(tmp_path)
    assert (found.name, found.step, found.attributes) == ("a", 3, {"note": "x"})
