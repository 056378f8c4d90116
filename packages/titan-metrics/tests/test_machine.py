import json
import os
import subprocess
import sys

import torch

from titan_metrics.machine import environment, write_environment


def test_it_says_what_a_run_ran_on(monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("TITAN_PROXY", "http://me:word@proxy:80")
    monkeypatch.setenv("UNRELATED", "1")
    monkeypatch.setattr(sys, "argv", ["titan-train", "--data.source", "https://me:word@host/x"])
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["titan"]["titan-metrics"]
    assert found["cores"] == os.cpu_count()
    assert found["cpu"]
    assert found["memory_bytes"] > 2**28
    assert found["devices"] == [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    assert found["variables"]["NCCL_DEBUG"] == "INFO"
    assert "UNRELATED" not in found["variables"]
    text = json.dumps(found)
    assert "secret" not in text
    assert "word" not in text
    assert found["command"] == ["titan-train", "--data.source", "https://…@host/x"]


def test_the_revision_is_that_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["git"] is None

    def git(*arguments):
        who = ["-c", "user.name=x", "-c", "user.email=x@x"]
        return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "x")
    assert environment()["git"] == {"revision": git("rev-parse", "HEAD"), "changed": False}
    (tmp_path / "file").write_text("2")
    assert environment()["git"]["changed"] is True


def test_it_is_written_anew_at_each_start(tmp_path):
    path = tmp_path / "environment.json"
    write_environment(path, world_size=2)
    write_environment(path, world_size=4)
    found = json.loads(path.read_text())
    assert found["world_size"] == 4
    assert found["host"]
    assert list(tmp_path.iterdir()) == [path]
