import json
import threading
import time

import pytest

from titan_metrics.spans import Spans


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_says_who_wrote_it_and_what_took_how_long(tmp_path):
    clock, path = Clock(), tmp_path / "spans" / "rank-3.jsonl"
    with Spans(path, rank=3, world_size=4, clock_offset=0.25, clock=clock) as spans:
        spans.step = 7
        with spans.span("forward_backward", kind="train"):
            clock.now += 1.0
            with spans.span("loss"):
                clock.now += 0.5
        spans.step = None
        with spans.span('odd "name"'):
            pass
    header, inner, outer, last = lines(path)
    assert abs(header["start"] - time.time()) < 60
    assert {key: header[key] for key in ("rank", "world_size", "clock_offset")} == {
        "rank": 3,
        "world_size": 4,
        "clock_offset": 0.25,
    }
    assert inner == {"name": "loss", "step": 7, "at": 1.0, "seconds": 0.5, "depth": 1}
    assert outer == {"name": "forward_backward", "step": 7, "at": 0.0, "seconds": 1.5, "depth": 0, "kind": "train"}
    assert (last["name"], last["step"]) == ('odd "name"', None)


def test_time_is_split_among_outermost_spans():
    clock = Clock()
    spans = Spans(clock=clock)
    assert spans.read() == {}
    for _ in range(2):
        with spans.span("data_wait"):
            clock.now += 1.0
        with spans.span("forward_backward"), spans.span("loss"):
            clock.now += 3.0
        clock.now += 0.5
    assert spans.read() == {"time.data_wait": 2.0, "time.forward_backward": 6.0, "time.other": 1.0}
    with spans.span("data_wait"):
        clock.now += 1.0
    assert spans.read() == {"time.data_wait": 1.0, "time.other": 0.0}


def test_waiting_counts_in_every_open_span(tmp_path):
    path = tmp_path / "spans.jsonl"
    with Spans(path) as spans:
        with spans.span("outer"):
            with spans.span("inner"):
                spans.wait(0.5)
            spans.wait(0.25)
        with spans.span("free"):
            pass
    assert {line["name"]: line.get("waited") for line in lines(path)[1:]} == {
        "inner": 0.5,
        "outer": 0.75,
        "free": None,
    }


def test_a_pipelines_actions_lie_inside_the_open_span(tmp_path):
    path = tmp_path / "spans.jsonl"
    with Spans(path) as spans, spans.span("forward_backward"):
        start = time.perf_counter()
        spans.action("F", 2, 5, start, start + 0.001)
    action = lines(path)[1]
    assert (action["name"], action["stage"], action["micro_batch"], action["depth"]) == ("F", 2, 5, 1)
    assert action["seconds"] == pytest.approx(0.001)


def test_another_threads_spans_are_its_own(tmp_path):
    path = tmp_path / "spans.jsonl"
    with Spans(path) as spans, spans.span("training"):
        thread = threading.Thread(target=lambda: spans.span("read").__enter__().__exit__(None, None, None), name="io")
        thread.start()
        thread.join()
        assert spans.open() == ["training"]
        spans.wait(1.0)
    read, training = lines(path)[1:]
    assert (read["name"], read["depth"], read["thread"]) == ("read", 0, "io")
    assert "thread" not in training
    assert spans.read().keys() == {"time.training", "time.other"}


def test_an_error_passes_and_its_span_is_kept(tmp_path):
    path = tmp_path / "spans.jsonl"
    with pytest.raises(KeyError), Spans(path) as spans, spans.span("broken"):
        raise KeyError("x")
    assert lines(path)[1]["name"] == "broken"
    assert spans.open() == []


def test_spans_reach_the_file_while_the_process_runs(tmp_path):
    path = tmp_path / "spans.jsonl"
    with Spans(path, flush_seconds=0.01) as spans:
        with spans.span("step"):
            pass
        deadline = time.monotonic() + 30
        while len(lines(path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lines(path)[1]["name"] == "step"


def test_a_second_start_is_appended_after_a_torn_line(tmp_path):
    path = tmp_path / "spans.jsonl"
    path.write_text('{"name": "tor')
    Spans(path).close()
    torn, header = path.read_text().splitlines()
    assert torn == '{"name": "tor'
    assert json.loads(header)["rank"] == 0


def test_a_full_disk_costs_the_file_and_not_the_run(tmp_path, caplog, full_disk):
    path = tmp_path / "spans.jsonl"
    spans = Spans(path, flush_seconds=60)
    with full_disk(bytes_left=2000):
        for _ in range(3):
            for _ in range(50):
                with spans.span("step"):
                    pass
            spans.flush()
        spans.close()
    assert len(caplog.records) == 1
    assert "Spans" in caplog.records[0].getMessage()
    assert spans.read()["time.step"] > 0


@pytest.mark.parametrize("blocked", ["spans", "spans/rank-0.jsonl"])
def test_a_file_that_cannot_be_opened_costs_one_warning(tmp_path, caplog, blocked):
    if blocked == "spans":
        (tmp_path / "spans").write_text("in the way")
    else:
        (tmp_path / blocked).mkdir(parents=True)
    with Spans(tmp_path / "spans/rank-0.jsonl", flush_seconds=0.01) as spans, spans.span("step"):
        time.sleep(0.05)
    (record,) = caplog.records
    assert "Spans are not written" in record.getMessage()
    assert spans.read()["time.step"] >= 0.05
