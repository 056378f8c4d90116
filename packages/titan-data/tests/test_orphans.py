"""Real processes that are killed: nothing that they started stays behind."""

import os
import subprocess
import sys
import time

WORKERS = """
import os, sys
from multiprocessing import forkserver
from titan_data.worker_processes import WorkerProcesses

def read(number):
    return os.getpid()

if __name__ == "__main__":
    processes = WorkerProcesses(read, 0, workers=2, depth=2, timeout_seconds=60)
    pids = {processes.take() for _ in range(4)}
    print(forkserver._forkserver._forkserver_pid, *pids, flush=True)
    sys.stdin.read()
"""


def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_loaders_workers_and_their_server_end_within_seconds(tmp_path):
    (tmp_path / "program.py").write_text(WORKERS)
    command = [sys.executable, tmp_path / "program.py"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        pids = [int(word) for word in program.stdout.readline().split()]
        assert len(pids) == 3
        assert all(map(is_there, pids))
        program.kill()
    deadline = time.monotonic() + 10
    while any(map(is_there, pids)):
        assert time.monotonic() < deadline, "still there"
        time.sleep(0.05)
