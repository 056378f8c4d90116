import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from ranks import RankFailure, run_ranks
from titan_metrics.config import WatchdogConfig
from titan_metrics.heartbeats import read_heartbeats
from titan_metrics.spans import Spans
from titan_metrics.watchdog import Watchdog


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_survivors_of_a_stopped_rank_end_and_name_it_and_the_collective(tmp_path):
    dumps = tmp_path / "dumps"

    def train():
        rank, x = dist.get_rank(), torch.ones(4)
        config = WatchdogConfig(stall_seconds=1.5, exit_seconds=3.0, heartbeat_seconds=0.2, exit_code=76)
        spans = Spans(tmp_path / f"spans/rank-{rank}.jsonl", rank=rank, flush_seconds=60)
        with Watchdog(
            tmp_path, config, rank=rank, world_size=2, phases=spans.open, before_exit=spans.flush
        ) as watchdog:
            for step in range(1, 10):
                spans.step = step
                with spans.span("forward_backward"):
                    if rank == 1 and step == 4:
                        wait_for(lambda: read_heartbeats(tmp_path / "heartbeats")[1].step == 3)
                        _stop_until(lambda: (dumps / "hang-rank-0-step-3.txt").exists())
                    with spans.span("reduce"):
                        dist.all_reduce(x)
                watchdog.end_step(step)

    with pytest.raises(RankFailure, match="rank 0 ended with 76"):
        run_ranks(2, train)
    report = (dumps / "hang-rank-0-step-3.txt").read_text()
    assert "Missing: rank 1" in report
    assert "it had ended step 3 then" in report
    assert "It is in forward_backward > reduce." in report
    assert "rank 0 waits in gloo:all_reduce number 4 of group 0 (default_pg), of float [4]; not there: rank 1" in report
    assert "all_reduce" in (dumps / "stacks-rank-0-step-3.txt").read_text()
    assert len((tmp_path / "spans/rank-0.jsonl").read_text().splitlines()) == 1 + 2 * 3
    assert not (dumps / "hang-rank-1-step-3.txt").exists()


def _stop_until(done):
    """Stops this process, as a debugger or a dying machine does; a child of it ends it when `done`."""
    parent = os.getpid()
    if os.fork() == 0:
        wait_for(done)
        os.kill(parent, signal.SIGKILL)
        os._exit(0)
    os.kill(parent, signal.SIGSTOP)


def test_a_stall_is_written_down_once_and_may_pass(tmp_path, caplog):
    with Watchdog(tmp_path, WatchdogConfig(stall_seconds=0.2)) as watchdog:
        watchdog.end_step(1)
        wait_for(lambda: caplog.records)
        watchdog.end_step(2)
        wait_for(lambda: len(caplog.records) > 1 or watchdog.end_step(2))
    messages = [record.getMessage() for record in caplog.records]
    assert "after step 1" in messages[0]
    assert "goes on after step 2" in messages[1]
    assert "test_watchdog" in (tmp_path / "dumps/stacks-rank-0-step-1.txt").read_text()


def test_nothing_is_too_long_before_the_first_step_and_while_paused(tmp_path, caplog):
    with Watchdog(tmp_path, WatchdogConfig(stall_seconds=0.2)) as watchdog:
        with watchdog.paused():
            time.sleep(0.5)
        time.sleep(0.5)
        assert caplog.records == []
        watchdog.end_step(1)
        with watchdog.paused():
            time.sleep(0.5)
            assert caplog.records == []
        wait_for(lambda: caplog.records)  # and from then on it is


def test_a_process_whose_interpreter_is_stuck_ends_too(tmp_path):
    # A regular expression holds the interpreter for as long as it likes.
    code = (
        "import re, sys, pathlib\n"
        "from titan_metrics.config import WatchdogConfig\n"
        "from titan_metrics.watchdog import Watchdog\n"
        "import time\n"
        "watchdog = Watchdog(pathlib.Path(sys.argv[1]), WatchdogConfig(exit_seconds=0.4))\n"
        "watchdog.end_step(1)\n"
        "time.sleep(0.25)\n"
        "re.match(r'(a+)+b', 'a' * 60)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, timeout=60, check=False)
    assert run.returncode == 1
    assert "Timeout" in (tmp_path / "dumps/stacks-rank-0.txt").read_text()


def test_sigusr2_writes_the_stacks(tmp_path):
    path = tmp_path / "dumps/stacks-rank-0.txt"
    with Watchdog(tmp_path, WatchdogConfig()):
        os.kill(os.getpid(), signal.SIGUSR2)
        wait_for(lambda: "test_sigusr2_writes_the_stacks" in path.read_text())


def test_heartbeats_go_on_and_end_with_the_watchdog(tmp_path):
    path = tmp_path / "heartbeats/rank-3.json"
    with Watchdog(tmp_path, WatchdogConfig(heartbeat_seconds=0.02), rank=3) as watchdog:
        first = json.loads(path.read_text())
        assert (first["rank"], first["process"], first["step"]) == (3, os.getpid(), 0)
        watchdog.end_step(8)
        wait_for(lambda: read_heartbeats(path.parent)[3].step == 8)
    assert not path.exists()
    assert list((tmp_path / "dumps").iterdir()) == []  # nothing happened


def test_a_full_disk_does_not_end_the_watch(tmp_path, caplog, full_disk):
    with Watchdog(tmp_path, WatchdogConfig(stall_seconds=0.1)) as watchdog:
        with full_disk(bytes_left=0):
            wait_for(lambda: caplog.records)
            watchdog.end_step(1)
        wait_for(lambda: (tmp_path / "dumps/stacks-rank-0-step-1.txt").exists())
    assert "could not write" in caplog.records[0].getMessage()


@pytest.mark.parametrize("blocked", ["dumps", "heartbeats"])
def test_a_folder_that_cannot_be_written_to_costs_one_warning(tmp_path, caplog, blocked):
    (tmp_path / blocked).write_text("in the way")
    with Watchdog(tmp_path, WatchdogConfig(stall_seconds=0.2, heartbeat_seconds=0.02)) as watchdog:
        watchdog.end_step(1)
        wait_for(lambda: any("no step has ended" in record.getMessage() for record in caplog.records))
    told = [record.getMessage() for record in caplog.records if "could not write" in record.getMessage()]
    assert len(told) == 1
    assert blocked in told[0]
    assert (tmp_path / blocked).read_text() == "in the way"
