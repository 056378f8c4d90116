import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from titan_metrics.jsonl import DamagedFileError, JsonlSink, read_jsonl, resume_jsonl


def write(path, *steps):
    path.write_text("".join(f'{{"step": {step}, "loss": {step}.5}}\n' for step in steps))


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


def test_one_object_a_line_step_first_with_all_digits(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    third = 1 / 3
    sink.log(7, {"loss": third, "tokens": 2**60, "note": 'a "quote"\nand ü'})
    sink.close()
    line = path.read_text()
    assert line.startswith('{"step": 7, "loss": ')
    assert line.count("\n") == 1
    assert json.loads(line) == {"step": 7, "loss": third, "tokens": 2**60, "note": 'a "quote"\nand ü'}


def test_non_finite_values_are_valid_json_that_float_reads(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log(1, {"loss": math.nan, "up": math.inf, "down": -math.inf, "fine": 2.0})
    sink.close()
    record = json.loads(path.read_text(), parse_constant=no_constant)
    assert math.isnan(float(record["loss"]))
    assert float(record["up"]) == math.inf
    assert float(record["down"]) == -math.inf
    assert record["fine"] == 2.0


def test_a_killed_process_loses_no_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, signal, sys, pathlib; from titan_metrics.jsonl import JsonlSink; "
        "sink = JsonlSink(pathlib.Path(sys.argv[1])); [sink.log(step, {'loss': 1.0}) for step in range(50)]; "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert steps(path) == list(range(50))


def test_resuming_moves_the_lines_that_will_be_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2, 3, 4, 5)
    assert resume_jsonl(path, 3) == 2
    assert steps(path) == [1, 2, 3]
    assert steps(tmp_path / "metrics.redone.jsonl") == [4, 5]

    sink = JsonlSink(path)
    sink.log(4, {"loss": 0.0})
    sink.close()
    assert resume_jsonl(path, 1) == 3
    assert steps(path) == [1]
    assert steps(tmp_path / "metrics.redone.jsonl") == [4, 5, 2, 3, 4]


def test_nothing_to_move_changes_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert resume_jsonl(path, 3) == 0
    write(path, 1, 2)
    before = path.stat()
    assert resume_jsonl(path, 2) == 0
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "torn", ['{"step": 2, "lo', '{"step": 2}', "[1, 2]\n", '{"loss": 1.0}\n', '{"step": "2"}\n', "\0\0\n"]
)
def test_lines_that_are_no_record_move_too(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write(path, 1)
    with path.open("a") as file:
        file.write(torn)
    assert resume_jsonl(path, 10) == 1
    assert steps(path) == [1]
    assert (tmp_path / "metrics.redone.jsonl").read_text() == torn.rstrip("\n") + "\n"


@pytest.mark.parametrize("fatal", [1, 2])
def test_an_interruption_loses_no_line_and_doubles_none(tmp_path, monkeypatch, fatal):
    path, redone = tmp_path / "metrics.jsonl", tmp_path / "metrics.redone.jsonl"
    write(path, 1, 2, 3)
    write(redone, 8, 9)
    real, calls = Path.replace, []

    def killed_before(self, target):
        calls.append(target)
        if len(calls) == fatal:
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed_before)
        with pytest.raises(KeyboardInterrupt):
            resume_jsonl(path, 1)
    assert steps(path) == [1, 2, 3]

    resume_jsonl(path, 1)
    assert steps(path) == [1]
    assert steps(redone) == [8, 9, 2, 3]


def test_it_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2)
    order = []
    real_sync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("sync"), real_sync(fd)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (order.append(to.name), real_replace(self, to)))
    resume_jsonl(path, 1)
    assert order == ["sync", "metrics.redone.jsonl", "sync", "metrics.jsonl"]


def test_a_file_that_is_being_written_is_read_as_far_as_it_goes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert list(read_jsonl(path)) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}')
    assert list(read_jsonl(path)) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"step": 2}\n{"st\n')
    assert list(read_jsonl(path)) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"start": 1.0}\n')  # what a killed process has left, and the next one
    assert list(read_jsonl(path)) == [{"step": 1}, {"start": 1.0}]


@pytest.mark.parametrize("line", ["no json", "[1]", '{"step": 2, "lo'])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(DamagedFileError, match=r"metrics\.jsonl, line 2, is not a JSON object: it begins"):
        list(read_jsonl(path))


def test_a_clock_dates_each_line(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl", clock=lambda: 12.5)
    sink.log(1, {"loss": 2.0})
    sink.close()
    assert list(read_jsonl(tmp_path / "metrics.jsonl")) == [{"step": 1, "time": 12.5, "loss": 2.0}]
