import json
import os
import signal
from datetime import datetime

import pytest

from titan_train.status import StatusFile


def read(folder):
    return json.loads((folder / "status.json").read_text())


def test_a_run_says_running_and_then_what_became_of_it(tmp_path):
    with StatusFile(tmp_path) as status:
        running = read(tmp_path)
        assert (running["status"], running["process"], running["host"]) == ("running", os.getpid(), os.uname().nodename)
        assert datetime.fromisoformat(running["time"]).tzinfo is not None
        status.end(7, by=None)
    assert (read(tmp_path)["status"], read(tmp_path)["step"]) == ("finished", 7)
    with StatusFile(tmp_path) as status:
        status.end(9, by=signal.SIGTERM)
    after = read(tmp_path)
    assert (after["status"], after["step"], after["signal"]) == ("preempted", 9, "SIGTERM")
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_an_error_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such thing"), StatusFile(tmp_path):
        raise ValueError("no such thing")
    assert (read(tmp_path)["status"], read(tmp_path)["error"]) == ("failed", "ValueError: no such thing")
    with pytest.raises(KeyboardInterrupt), StatusFile(tmp_path):
        raise KeyboardInterrupt
    assert read(tmp_path)["status"] == "preempted"


def test_a_place_that_cannot_be_written_does_not_stop_the_run(tmp_path):
    with StatusFile(tmp_path / "gone") as status:
        status.end(1, by=None)
