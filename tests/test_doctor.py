"""titan-doctor on real ranks: what it measures, whom it finds, what it refuses."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ranks import run_ranks
from titan_ckpt.location import place_of
from titan_metrics.probes.links import OPERATIONS
from titan_metrics.probes.outliers import Outlier, Reading
from titan_train import doctor, doctor_cli
from titan_train.doctor import Findings, ProbeError, checkpoint_folder, examine
from titan_train.doctor_options import Options
from titan_train.doctor_text import as_text
from training_runs import TINY, change, layout

README = Path(__file__).parents[1] / "apps" / "train" / "README.md"
QUICK = Options(megabytes=1, repetitions=2)
QUICK_FLAGS = ["--megabytes=1", "--repetitions=2", "--device=cpu"]


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    monkeypatch.setattr(doctor, "_MATRIX_SIZE", {"cpu": 128})


def probes(findings, kind):
    return [reading.probe for reading in findings.rates if kind in reading.probe]


def test_two_ranks_measure_all_there_is(tmp_path):
    config = change(TINY, output=str(tmp_path / "run"))
    both = run_ranks(2, examine, config, QUICK)
    assert [finding.rates for finding in both] == [both[0].rates] * 2
    findings = both[0]
    assert findings.layout == "2 ranks: dp_shard 2 on cpu"
    assert probes(findings, "matmul") == ["matmul float32", "matmul bfloat16"]
    assert probes(findings, "over") == [f"{operation} over dp_shard" for operation in OPERATIONS]
    assert probes(findings, str(tmp_path)) == [f"write to {tmp_path}", f"read from {tmp_path}"]
    assert all(len(reading.values) == 2 and min(reading.values) > 0 for reading in findings.rates)
    assert len(findings.clocks.values) == 2
    assert 0 < findings.clock_error < 0.05
    assert abs(findings.clocks.values[1]) <= findings.clock_error + 1e-6
    assert findings.host["torch"]
    assert list(tmp_path.iterdir()) == []


def test_every_axis_of_a_mesh_is_measured_and_those_that_are_the_same_once(monkeypatch):
    options = Options(probes=("links",), megabytes=1, repetitions=1)
    monkeypatch.setattr(doctor, "describe_host", dict)

    def axes(**degrees):
        return run_ranks(4, examine, change(TINY, **layout(**degrees)), options)[0]

    def names(findings):
        return [probe.removeprefix("all_reduce over ") for probe in probes(findings, "all_reduce")]

    assert names(axes(tp=2)) == ["dp_shard", "tp", "all ranks"]
    assert names(axes(cp=2, pp=2)) == ["pp", "cp", "fsdp", "all ranks"]
    assert names(axes(ep=2)) == ["dp_shard", "expert_fsdp", "ep", "all ranks"]


@contextlib.contextmanager
def hindered():
    """Within, this process stands still most of the time, on any number of cores."""
    pid = os.getpid()
    child = os.fork()
    while not child:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.03)
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.004)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_rank_that_is_slowed_down_is_found(monkeypatch):
    real = doctor.matmul_rate
    monkeypatch.setattr(doctor, "_MATRIX_SIZE", {"cpu": 768})
    monkeypatch.setattr(doctor, "_DTYPES", {"cpu": ("float32",)})

    def measure(*arguments, **options):
        with hindered() if os.environ["RANK"] == "1" else contextlib.nullcontext():
            return real(*arguments, **options)

    monkeypatch.setattr(doctor, "matmul_rate", measure)
    options = Options(probes=("matmul",), repetitions=5, slower_than=0.4)
    for findings in run_ranks(3, examine, TINY, options):
        slowest = findings.outliers[0]
        assert (slowest.rank, slowest.probe) == (1, "matmul float32")
        assert slowest.value < 0.6 * slowest.median


def test_with_strict_a_rank_that_is_far_from_the_others_is_a_failure(monkeypatch, capsys):
    found = examine(TINY, dataclasses.replace(QUICK, probes=("matmul",)))
    bad = Outlier(rank=0, probe="matmul float32", unit="FLOP/s", value=1e9, median=2e9)
    monkeypatch.setattr(doctor, "examine", lambda config, options: dataclasses.replace(found, outliers=[bad]))
    assert main() == 0
    assert main("--strict") == 1
    assert capsys.readouterr().out.count("rank 0 is slow in matmul float32: 1.0 GFLOP/s, 50% below") == 2


def main(*arguments):
    with pytest.raises(SystemExit) as end:
        doctor_cli.main([*arguments])
    return end.value.code


def test_alone_it_prints_a_table(tmp_path, capsys):
    assert main(*QUICK_FLAGS, "--output", str(tmp_path), "--strict") == 0
    text = capsys.readouterr().out
    assert text.startswith("1 rank on cpu\n")
    assert re.search(r"^torch      2\.\d+\.\d+.*, Python 3", text, re.MULTILINE)
    assert re.search(r"^limits     open files \d+", text, re.MULTILINE)
    assert re.search(r"^matmul float32 +[\d.]+ GFLOP/s", text, re.MULTILINE)
    assert re.search(rf"^write to {tmp_path} +[\d.]+ [MG]B/s", text, re.MULTILINE)
    assert "over" not in text
    assert text.endswith("No rank is more than 20% slower than the median of the ranks.\n")


@pytest.mark.slow
def test_under_torchrun_it_prints_one_json_object(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = [*QUICK_FLAGS, "--json", "--parallel.tp=2", "--output", str(tmp_path)]
    command = [*launcher, "-m", "titan_train.doctor_cli", *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    assert found["layout"] == "2 ranks: tp 2 on cpu"
    assert found["rates"][0] == {"probe": "matmul float32", "unit": "FLOP/s", "values": found["rates"][0]["values"]}
    assert len(found["rates"][0]["values"]) == 2
    assert found["differences"] == []


def test_whoever_is_far_from_the_others_gets_a_sentence():
    findings = Findings(
        layout="4 ranks: tp 4 on cpu",
        host=doctor.describe_host(),
        differences=["torch: 2.12 on rank 3; 2.13 on most others"],
        rates=[Reading(probe="matmul bfloat16", unit="FLOP/s", values=(4e14, 4e14, 1e14, 4e14))],
        clocks=Reading(probe="clock", unit="s", values=(0.0, 0.0, -2.5, 0.0)),
        clock_error=0.001,
        outliers=[
            Outlier(rank=2, probe="matmul bfloat16", unit="FLOP/s", value=1e14, median=4e14),
            Outlier(rank=2, probe="clock", unit="s", value=-2.5, median=0.0),
        ],
    )
    text = as_text(findings, Options())
    assert "differs    torch: 2.12 on rank 3; 2.13 on most others" in text
    assert re.search(r"matmul bfloat16 +400\.0 TFLOP/s +100\.0 TFLOP/s  rank 2", text)
    assert "clocks are 2500.000 ms apart, within 1.000 ms" in text
    assert text.endswith(
        "rank 2 is slow in matmul bfloat16: 100.0 TFLOP/s, 75% below the median; has a clock 2.500 s behind the median"
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--slower-than", "20"], "20 is not a share"),
        (["--clock-seconds", "0"], "0 is not a time"),
        (["--megabytes", "0"], "0 is out of range"),
        (["--probes", "matrix"], "invalid choice: 'matrix'"),
        (["--probs", "matmul"], "There is no --probs. Did you mean --probes?"),
        (["--parallel.tensor", "2"], "--parallel.tensor"),
        (["--parallel.tp", "2"], "parallel.tp 2 does not divide"),
        (["--config", "llama9"], "llama9"),
    ],
)
def test_a_wrong_command_line_is_refused(flags, says, capsys):
    assert main(*flags) == 2
    assert says in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(capsys):
    assert main("--probes", "disk", "--output", "/proc/run", *QUICK_FLAGS) == 1
    assert "cannot write 1 MiB to the checkpoint folder /proc" in capsys.readouterr().err


def test_ranks_that_can_write_hear_of_those_that_cannot(tmp_path, monkeypatch):
    real = doctor.disk_speed

    def on_rank_1_the_disk_is_full(folder, num_bytes):
        if os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device")
        return real(folder, num_bytes)

    monkeypatch.setattr(doctor, "disk_speed", on_rank_1_the_disk_is_full)

    def look():
        with pytest.raises(ProbeError, match=r"Rank 1 cannot write .*No space left"):
            examine(change(TINY, output=str(tmp_path)), dataclasses.replace(QUICK, probes=("disk",)))

    run_ranks(2, look)


def test_the_checkpoint_folder_is_that_of_the_run_or_the_nearest_above(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoint_folder(TINY).path == tmp_path
    (tmp_path / "saved").mkdir()
    assert checkpoint_folder(change(TINY, **{"checkpoint.directory": "saved/here"})).path == tmp_path / "saved"
    assert checkpoint_folder(change(TINY, output="saved")).path == tmp_path / "saved"


def test_an_object_store_is_measured_and_left_as_it_was(s3_server):
    bucket = "s3://titan/doctor"
    config = change(TINY, **{"checkpoint.directory": bucket})
    findings = examine(config, dataclasses.replace(QUICK, probes=("disk",)))
    assert probes(findings, "s3://") == [f"write to {bucket}", f"read from {bucket}"]
    assert min(min(reading.values) for reading in findings.rates) > 0
    assert place_of(bucket).files() == {}


def test_every_command_in_the_readme_is_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^ *.*(?:titan-doctor|titan_train\.doctor_cli) (--.*)", README.read_text(), re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        known, rest = doctor_cli.build_parser().parse_known_args(shlex.split(line, comments=True))
        assert doctor_cli._configuration(known, rest)
