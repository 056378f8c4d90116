"""Real processes; what they are given stands in a module of its own, since they import it by name."""

import importlib
import os
import signal
import sys
import time

import pytest

from titan_data.errors import ReadingError
from titan_data.worker_processes import WorkerProcesses

READERS = """
import os, time
import numpy as np

def read(number):
    return {"tokens": np.full((2,), number), "pid": os.getpid()}

def fail_at_2(number):
    if number == 2:
        raise OSError("bad sector")
    return number

def hang_at_2(number):
    if number == 2:
        wait_for_a_disk_that_never_answers()
    return number

def wait_for_a_disk_that_never_answers():
    time.sleep(1000)
"""


@pytest.fixture
def readers(tmp_path, monkeypatch):
    (tmp_path / "readers_of_test.py").write_text(READERS)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("readers_of_test")
    del sys.modules["readers_of_test"]


@pytest.fixture
def start():
    started = []

    def start(read, first=0, **options):
        started.append(WorkerProcesses(read, first, **({"workers": 1, "depth": 2, "timeout_seconds": 60} | options)))
        return started[-1]

    yield start
    for processes in started:
        processes.close()


def test_results_come_in_order_from_the_first_and_from_all_workers(readers, start):
    processes = start(readers.read, 5, workers=2, depth=4)
    results = [processes.take() for _ in range(6)]
    assert [result["tokens"].tolist() for result in results] == [[number] * 2 for number in range(5, 11)]
    assert len({result["pid"] for result in results} - {os.getpid()}) == 2


def test_an_error_arrives_in_its_turn_with_the_workers_traceback(readers, start):
    processes = start(readers.fail_at_2)
    assert [processes.take(), processes.take()] == [0, 1]
    with pytest.raises(OSError, match=r"in fail_at_2\n.*\n.*bad sector"):
        processes.take()


@pytest.mark.slow  # noticed by asking every five seconds, and once more when it is closed
def test_a_worker_that_dies_is_an_error(readers, start):
    processes = start(readers.read)
    os.kill(processes.take()["pid"], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(ReadingError, match=r"has died .*use fewer workers"):
        list(iter(processes.take, None))
    assert time.monotonic() - began < 15


@pytest.mark.slow  # the loader is asked every five seconds here too
def test_a_worker_that_hangs_is_an_error_that_says_where(readers, start):
    processes = start(readers.hang_at_2, timeout_seconds=0.5)
    assert [processes.take(), processes.take()] == [0, 1]
    began = time.monotonic()
    with pytest.raises(ReadingError, match=r"not finished a batch in 0\.5 seconds.*(?s:.*)wait_for_a_disk_that_never"):
        processes.take()
    assert time.monotonic() - began < 15


def test_what_cannot_be_sent_is_refused(start):
    with pytest.raises(ReadingError, match=r"cannot be sent to worker processes .*read it with workers=0"):
        start(lambda number: number)


def test_a_forked_child_does_not_disturb_its_parents_workers(readers, start):
    processes = start(readers.read)
    assert processes.take()["tokens"].tolist() == [0, 0]
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        code = 1
        try:
            assert processes.forked
            processes.close()
            with pytest.raises(ReadingError, match="a process that was forked cannot have worker processes"):
                start(readers.read)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [processes.take()["tokens"][0] for _ in range(8)] == list(range(1, 9))
    assert processes._folder.exists()


def test_closing_ends_the_workers_and_leaves_nothing_behind(readers, start):
    processes = start(readers.read)
    pid, folder = processes.take()["pid"], processes._folder
    assert folder.exists()
    processes.close()
    assert not folder.exists()
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the worker is still there")
