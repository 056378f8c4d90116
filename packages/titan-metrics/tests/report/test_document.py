import json
import re

from titan_metrics.report import charts as charts_module
from titan_metrics.report.document import SECTIONS, build, page
from titan_metrics.report.run import open_runs


def test_a_page_is_whole_in_itself(make_run):
    html = page(build(open_runs([make_run("a"), make_run("b", lr=5e-4)])))
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", html)
    assert "connect-src 'none'" in html
    for name in SECTIONS:
        assert f'<section id="{name}"' in html


def test_two_runs_are_compared(make_run):
    parts = build(open_runs([make_run("a"), make_run("b", lr=5e-4)])).parts
    differs = re.findall(r'<tr class="differs">\s*<th scope="row">([^<]+)', parts["section/configuration"])
    assert set(differs) == {"optimizer.lr"}
    assert {line["run"] for line in parts["chart/loss"]["series"]} == {0, 1}
    assert [run["name"] for run in parts["runs"]] == ["a", "b"]


def test_the_axes_map_steps_to_tokens_and_hours(make_run):
    (run,) = build(open_runs([make_run()])).parts["runs"]
    steps, tokens = run["tokens"]
    assert (steps[0], tokens[0], tokens[-1]) == (1, 4096, 4096 * 60)
    steps, hours = run["hours"]
    assert (steps[-1], round(hours[-1] * 3600)) == (60, 2 * 59)


def test_a_section_without_data_says_so(bare_run):
    parts = build(open_runs([bare_run])).parts
    said = {name: re.findall(r'<p class="empty">([^<]+)', parts[f"section/{name}"]) for name in SECTIONS}
    silent = {name for name, text in said.items() if not text}
    assert silent == {"summary", "learning", "files"}
    assert parts["section/files"].count("missing") == 5


def test_steps_that_were_not_recorded_are_not_taken_for_missing_spans(make_run, bare_run):
    found = page(build(open_runs([make_run()], (900, 910))))
    assert "there is none that all ranks have finished" in found
    assert "there is no spans/rank-N.jsonl" not in found
    assert "there is no spans/rank-N.jsonl" in page(build(open_runs([bare_run])))


def test_a_damaged_environment_costs_its_section_only(make_run):
    run = make_run()
    (run / "environment.json").write_text("")
    found = page(build(open_runs([run])))
    assert "there is no environment.json that can be read" in found
    assert "damaged <small>no environment</small>" in found


def test_what_files_hold_cannot_break_the_page(bare_run):
    bad = "</script><script>alert(1)</script>"
    (bare_run / "config.json").write_text(json.dumps({bad: bad}))
    with (bare_run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, bad: 1.0}) + "\n")
    html = page(build(open_runs([bare_run])))
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html


def test_only_what_changed_has_another_version(make_run):
    folder = make_run()
    runs = open_runs([folder])
    before = build(runs).versions()
    assert build(runs).versions() == before
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "loss": 2.0}\n')
    runs[0].refresh()
    after = build(runs).versions()
    assert {name for name in after if after[name] != before[name]} == {
        "chart/loss",
        "section/learning",
        "section/summary",
    }


def test_a_page_stays_small_however_many_points_there_are(make_run, monkeypatch):
    runs = open_runs([make_run()])
    whole = len(page(build(runs)))
    monkeypatch.setattr(charts_module, "PAGE_POINTS", 1)
    assert len(page(build(runs))) < whole
