"""Runs a function on N ranks: forked processes that talk through gloo, ready in a tenth of a second.

Assumes that the tests of one process run one after another, and that torch and the modules under test are
imported before the first fork (a forked rank inherits them; importing torch anew would cost seconds a rank).

Why it is built the way it is:

- one thread: a child that forks after its parent ran an operation with two threads hangs in libgomp, so this
  module sets one thread when it is imported, before any operation;
- a file store: a TCP store owned by the parent has a thread, and a thread does not survive a fork;
- `os._exit` in the children: pytest's own exit handlers must not run once per rank.
"""

import contextlib
import datetime
import faulthandler
import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

torch.set_num_threads(1)
# The first threads of a child that touch torch's pool would race to replace the one that the fork has left broken.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

_GRACE_SECONDS = 8.0  # how long the other ranks may live once one has failed: enough to write a traceback


class RankFailure(AssertionError):
    """One or more ranks raised, died or hung; the message holds what each of them printed."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0, **kwargs: Any
) -> list[Any]:
    """Calls `function(*args, **kwargs)` on every rank of a new gloo group and returns the results in rank order.

    `function` may be a closure (ranks are forked); what it returns must be picklable. `RANK`, `WORLD_SIZE` and
    `LOCAL_RANK` are set as a launcher sets them.

    Raises:
        RankFailure: with every rank's traceback, or its stack if it hung for `timeout` seconds.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    gc.freeze()  # a rank that collects garbage would touch, and so copy, all that it has inherited
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        pids = {}
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                _child(rank, world_size, lambda: function(*args, **kwargs), directory, timeout)
            pids[pid] = rank
        gc.unfreeze()
        codes = _wait(pids, timeout)
        failed = {rank: code for rank, code in codes.items() if code != 0}
        if failed:
            raise RankFailure(_report(failed, directory))
        return [pickle.loads((directory / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _child(rank: int, world_size: int, function: Callable[[], Any], directory: Path, timeout: float) -> None:
    code = 1
    try:
        stacks = (directory / f"stack-{rank}").open("w")
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        # A group connects two ranks when they first talk: 8 ranks have dozens of groups, and most pairs never do.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(directory / "store"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        result = function()
        (directory / f"result-{rank}").write_bytes(pickle.dumps(result))
        dist.destroy_process_group()
        code = 0
    except BaseException:  # the traceback must reach the parent whatever was raised
        (directory / f"error-{rank}").write_text(traceback.format_exc())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(pids: dict[int, int], timeout: float) -> dict[int, int]:
    """Exit codes by rank; a rank that outlives the deadline shows its stack, is killed, and counts as failed."""
    running, codes = dict(pids), {}
    deadline = time.monotonic() + timeout + _GRACE_SECONDS
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
            if codes and any(codes.values()):
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            continue
        if time.monotonic() > deadline:
            for survivor in running:
                os.kill(survivor, signal.SIGUSR2)
            time.sleep(0.5)
            for survivor in running:
                os.kill(survivor, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.002)
    return codes


def _report(failed: dict[int, int], directory: Path) -> str:
    parts = []
    for rank, code in sorted(failed.items()):
        parts.append(f"rank {rank} ended with {code}")
        for name in (f"error-{rank}", f"stack-{rank}"):
            path = directory / name
            if path.exists():
                parts.append(path.read_text())
    return "\n".join(parts)
