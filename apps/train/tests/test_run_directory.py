import os
import subprocess
import sys

import pytest

from titan_train.config_file import read_config
from titan_train.configs.llama3 import llama3_debug
from titan_train.run_directory import RunDirectory, RunDirectoryError, default_directory


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path):
    code = (
        "import sys; from pathlib import Path; from titan_train.run_directory import RunDirectory\n"
        f"d = RunDirectory(Path({str(tmp_path)!r})); d.claim(); print('claimed', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "claimed\n"
    directory = RunDirectory(tmp_path)
    with pytest.raises(RunDirectoryError, match=f"in use by another titan-train .process {other.pid} on"):
        directory.claim()
    other.kill()
    other.communicate()
    directory.claim()
    assert (tmp_path / "lock").read_text().startswith(f"{os.getpid()} on ")
    directory.release()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match=r"Cannot write to the run directory .*choose another with --output"):
        RunDirectory(tmp_path / "file" / "run").claim()


def test_the_resolved_configuration_is_written_whole(tmp_path):
    directory = RunDirectory(tmp_path)
    (tmp_path / "config.json").write_text("older")
    directory.write_config(llama3_debug())
    assert read_config(tmp_path / "config.json") == llama3_debug()
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_runs_of_one_second_have_a_directory_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        names.append(default_directory("small"))
        names[-1].mkdir(parents=True)
    assert len(set(names)) == 3
