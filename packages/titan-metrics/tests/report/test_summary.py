import json

from titan_metrics.report.run import open_runs
from titan_metrics.report.summary import elapsed_hours, facts, notices


def test_a_run_in_a_dozen_numbers(make_run):
    found = {fact.name: (fact.values[0], fact.remarks[0]) for fact in facts(open_runs([make_run()]))}
    assert found["Loss"][1].startswith("lowest ")
    assert found["Steps"] == ("60", "of 60")
    assert found["Tokens"] == ("246 k", "")
    assert found["MFU"] == ("41.2 %", "median")
    assert found["Peak memory"] == ("6.05 GiB", "")
    assert found["Goodput"] == ("62.5 %", "")
    assert found["Restarts"] == ("1", "10 logged steps redone")


def test_what_no_run_has_is_left_out(bare_run):
    assert [fact.name for fact in facts(open_runs([bare_run]))] == ["Loss", "Steps"]


def test_a_run_that_lacks_what_another_has_shows_a_dash(bare_run, make_run):
    mfu = next(fact for fact in facts(open_runs([bare_run, make_run()])) if fact.name == "MFU")
    assert mfu.values[0] == "—"


def test_what_went_wrong_is_said(make_run):
    folder = make_run(slow=1)
    (folder / "status.json").write_text(json.dumps({"status": "failed", "error": "ValueError: no"}))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "loss": "NaN"}\n')
    texts = [notice.text for notice in notices(open_runs([folder]))]
    assert texts[0] == "The run failed: ValueError: no"
    assert texts[1] == "loss was NaN or infinite once, first at step 61."
    assert texts[2].startswith("Rank 1 is slow in data_wait: 50.0 ms a step")
    assert notices(open_runs([make_run("well")])) == []


def test_a_clock_that_was_set_back_does_not_go_back():
    assert elapsed_hours([0.0, 3600.0, 1800.0, 5400.0]) == [0.0, 1.0, 1.0, 2.0]
    assert elapsed_hours([]) == []
