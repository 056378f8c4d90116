import json

import pytest

from titan_metrics.goodput import PARTS, Ledger, goodput


def events(*rows, run="a"):
    return [
        {"event": event, "time": time, "step": step, "seconds": seconds, "run": run}
        for event, time, step, seconds in rows
    ]


FIRST = events(
    ("start", 0, None, None),
    ("restore", 6, 0, 1),
    ("ready", 10, 0, None),
    ("compile", 14, None, 4),
    ("step", 24, 10, 10),
    ("save", 26, 10, 2),
    ("step", 36, 20, 10),
)


def test_seconds_become_shares_of_the_whole():
    shares = goodput([*FIRST, *events(("validate", 39, 20, 3), ("end", 40, 20, None))])
    assert shares == pytest.approx(
        {
            "useful": 20 / 40,
            "redone": 0.0,
            "start": 9 / 40,
            "compile": 4 / 40,
            "restore": 1 / 40,
            "data": 0.0,
            "validate": 3 / 40,
            "save": 2 / 40,
            "down": 0.0,
            "other": 1 / 40,
        }
    )
    assert tuple(shares) == PARTS


def test_a_restart_costs_down_time_and_the_steps_done_again():
    again = events(
        ("start", 46, None, None),
        ("restore", 47, 10, 1),
        ("ready", 48, 10, None),
        ("step", 63, 25, 15),  # of these steps 11 to 20 were done before
        ("end", 63, 25, None),
        run="b",
    )
    shares = goodput([*FIRST, *again])
    assert shares["down"] == pytest.approx(10 / 63)
    assert shares["redone"] == pytest.approx(10 / 63)
    assert shares["useful"] == pytest.approx((20 + 5) / 63)
    assert shares["restore"] == pytest.approx(2 / 63)
    assert sum(shares.values()) == pytest.approx(1.0)


def test_a_third_start_does_only_what_is_new_usefully():
    back = events(("start", 40, None, None), ("ready", 40, 0, None), ("step", 45, 5, 5), run="b")
    third = events(("start", 45, None, None), ("ready", 45, 5, None), ("step", 70, 30, 25), run="c")
    shares = goodput([*FIRST, *back, *third])
    assert shares["redone"] == pytest.approx((5 + 15) / 70)
    assert shares["useful"] == pytest.approx((20 + 10) / 70)


def test_no_time_has_no_shares():
    assert goodput([]) == {}
    assert goodput(events(("start", 5, None, None))) == {}


def test_a_ledger_goes_on_across_starts(tmp_path):
    path = tmp_path / "goodput.jsonl"
    times = iter(range(100))
    for step in (0, 10):
        ledger = Ledger(path, clock=lambda: next(times))
        ledger.record("start")
        ledger.record("ready", step=step)
        ledger.record("step", step=step + 10, seconds=1.0, data_seconds=0.25)
        ledger.close()
        with path.open("a") as file:
            file.write('{"event": "st')
    torn, *_ = path.read_text().splitlines()[3:4]
    assert torn == '{"event": "st'
    found = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    assert [event["event"] for event in found] == ["start", "ready", "step"] * 2
    assert len({event["run"] for event in found}) == 2
    assert found[2] == {"event": "step", "time": 2, "step": 10, "seconds": 1.0, "run": found[0]["run"]} | {
        "data_seconds": 0.25
    }
    assert goodput(found)["useful"] == pytest.approx(2 / 5)


def test_a_ledger_that_cannot_be_written_costs_one_warning(tmp_path, caplog, full_disk):
    (tmp_path / "file").write_text("")
    Ledger(tmp_path / "file" / "goodput.jsonl").record("start")
    assert len(caplog.records) == 1
    ledger = Ledger(tmp_path / "goodput.jsonl")
    with full_disk(bytes_left=10):
        ledger.record("start")
        ledger.record("ready")
    ledger.close()
    assert len(caplog.records) == 2
