import json
import math

import pytest

from titan_metrics.compare import NothingToCompareError, compare_runs, main, relative_difference


def write(run, *lines):
    run.mkdir()
    with (run / "metrics.jsonl").open("w") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")
    return run


def line(step, **values):
    return {"step": step, "time": 1e9 + step, "loss": 1.0, "grad_norm": 2.0, "mfu": 0.4, "time.other": 1.0} | values


def test_the_first_step_and_the_worst_metric_there_are_named(tmp_path):
    first = write(tmp_path / "a", *(line(step) for step in range(1, 6)))
    second = write(
        tmp_path / "b", *(line(s, loss=1.0 + (s > 2) * 1e-6, grad_norm=2 + (s > 2) * 0.5) for s in range(1, 6))
    )
    found = compare_runs(first, second)
    assert (found.divergence.step, found.divergence.metric) == (3, "grad_norm")
    assert (found.divergence.first, found.divergence.second) == (2.0, 2.5)
    assert found.divergence.difference == pytest.approx(0.2)
    assert found.greatest["loss"] == pytest.approx(1e-6, rel=1e-3)
    assert compare_runs(first, second, tolerance=0.3).divergence is None


def test_speed_time_and_memory_do_not_count(tmp_path):
    first = write(tmp_path / "a", line(1))
    other = {"time": 5.0, "mfu": 0.1, "time.other": 9.0, "memory.peak": 7, "tokens_per_second": 3.0}
    assert compare_runs(first, write(tmp_path / "b", line(1, **other))).divergence is None


def test_what_depends_on_the_layout_does_not_count(tmp_path):
    first = write(tmp_path / "a", line(1, loss_max=1.0, **{"replica.quorum_seconds": 0.1, "replica.groups": 2}))
    second = write(tmp_path / "b", line(1, loss_max=1.5, **{"replica.quorum_seconds": 0.2, "replica.groups": 1}))
    assert compare_runs(first, second).divergence is None


def test_a_damaged_line_is_named(tmp_path, capsys):
    first, second = write(tmp_path / "a", line(1), line(2), line(3)), write(tmp_path / "b", line(1), line(2), line(3))
    whole = (second / "metrics.jsonl").read_text().splitlines()
    (second / "metrics.jsonl").write_text("\n".join([whole[0], whole[1][:20], whole[2]]) + "\n")
    assert main([str(first), str(second)]) == 2
    assert f"{second}/metrics.jsonl, line 2, is not a JSON object" in capsys.readouterr().err


@pytest.mark.parametrize("tolerance", ["-1", "nan", "inf", "much"])
def test_a_tolerance_that_is_none_is_refused(tolerance, tmp_path, capsys):
    run = write(tmp_path / "a", line(1))
    with pytest.raises(SystemExit) as ended:
        main([str(run), str(run), f"--tolerance={tolerance}"])
    assert ended.value.code == 2
    assert "--tolerance" in capsys.readouterr().err


def test_steps_of_one_run_alone_are_counted(tmp_path):
    first = write(tmp_path / "a", line(1), line(2), line(3))
    found = compare_runs(first, write(tmp_path / "b", line(2), line(9)))
    assert (found.steps, found.alone) == (1, (2, 1))


@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [
        (1.0, 1.0, 0.0),
        (1.0, 2.0, 0.5),
        (-1.0, 1.0, 2.0),
        ("NaN", "NaN", 0.0),
        ("NaN", 1.0, math.inf),
        ("Infinity", "-Infinity", math.inf),
        ("Infinity", "Infinity", 0.0),
        ("warm", "warm", 0.0),
        ("warm", "cold", math.inf),
        (0.0, 0.0, 0.0),
    ],
)
def test_differences_are_relative(first, second, difference):
    assert relative_difference(first, second) == difference


def test_the_command_tells_and_its_code_says_it(tmp_path, capsys):
    first, same = write(tmp_path / "a", line(1), line(2)), write(tmp_path / "b", line(1), line(2), line(3))
    assert main([str(first), str(same)]) == 0
    assert capsys.readouterr().out == (
        "The runs are the same at all 2 steps that both have logged.\n"
        "Logged by the first run only: 0 steps; by the second: 1.\n"
    )
    other = write(tmp_path / "c", line(1), line(2, loss=1.25))
    assert main([str(first), str(other)]) == 1
    out = capsys.readouterr().out
    assert "differ from step 2 on: loss is 1.0 and 1.25, a relative difference of 0.2." in out
    assert "  loss: 0.2 at most" in out
    assert main([str(first), str(other), "--tolerance", "0.5"]) == 0


def test_nothing_to_compare_is_told(tmp_path, capsys):
    first = write(tmp_path / "a", line(1))
    with pytest.raises(NothingToCompareError, match="no step in common"):
        compare_runs(first, write(tmp_path / "b", line(2)))
    assert main([str(first), str(tmp_path / "none")]) == 2
    assert "metrics.jsonl does not exist" in capsys.readouterr().err
