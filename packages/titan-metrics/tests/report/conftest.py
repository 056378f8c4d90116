"""Run directories, written by what writes them in a real run."""

import json

import pytest

from recorded_runs import CONFIG, write_ledger, write_metrics, write_spans
from titan_metrics.jsonl import JsonlSink, resume_jsonl


@pytest.fixture
def make_run(tmp_path):
    """Makes a run directory with everything in it: 60 steps, restarted once after step 40."""

    def make(name="run", *, lr=1e-3, slow=None, status="finished"):
        folder = tmp_path / name
        write_metrics(folder, range(1, 51), lr=lr)
        resume_jsonl(folder / "metrics.jsonl", 40)
        write_metrics(folder, range(41, 61), lr=lr)
        write_ledger(folder)
        write_spans(folder, slow=slow)
        config = CONFIG | {"optimizer": CONFIG["optimizer"] | {"lr": lr}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "status.json").write_text(json.dumps({"status": status, "step": 60}))
        (folder / "environment.json").write_text(
            json.dumps({"python": "3.12.1", "variables": {"OMP_NUM_THREADS": "1"}})
        )
        return folder

    return make


@pytest.fixture
def bare_run(tmp_path):
    """A run directory with a few logged losses and nothing else."""
    folder = tmp_path / "bare"
    folder.mkdir()
    sink = JsonlSink(folder / "metrics.jsonl")
    for step in (1, 2, 3):
        sink.log(step, {"loss": 4.0 - step})
    sink.close()
    return folder
