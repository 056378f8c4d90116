"""Runs the commands and the Python of a page, each in a forked process that has imported everything already.

What `torchrun` starts becomes so many forked ranks.
"""

import contextlib
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist

from commands import PROGRAMS, SHELL, Command, CommandError, main_of
from ranks import RankFailure, run_ranks

_FINDINGS = (("titan-compare", 1),)
"""Exit codes that say what was found, and nothing of a failure."""
_TIMEOUT_SECONDS = 600.0


def nothing() -> None:
    """No preparation."""


def run(command: Command, folder: Path, setup: Callable[[], object] = nothing) -> str:
    """Runs a command in `folder`, after `setup` in the same process; returns what it printed.

    Of a command that the page says is refused, what went to standard error follows.

    Raises:
        CommandError: if it fails, or should be refused and is not; with what it said.
    """
    program, arguments = command.program, list(command.arguments)
    if program in SHELL:
        done = subprocess.run(command.text, shell=True, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CommandError(f"{command.text}\n{done.stderr}")
        return done.stdout

    def call() -> object:
        sys.argv = [program, *arguments]
        if program in PROGRAMS:
            return main_of(program)()
        sys.path.insert(0, str((folder / program).parent))
        return runpy.run_path(str(folder / program), run_name="__main__") and 0

    if program not in PROGRAMS and not program.endswith(".py"):
        raise CommandError(f"{command.text}: {program} can only be in a block with a mark.")
    return _forked(call, command, folder, setup)


def run_python(text: str, where: str, folder: Path, setup: Callable[[], object] = nothing) -> str:
    """Executes Python as a program of its own in `folder`; returns what it printed.

    Raises:
        CommandError: if it fails, with the traceback.
    """

    def call() -> None:
        exec(compile(text, where, "exec"), {"__name__": "__main__"})

    return _forked(call, Command(text=where, program="python", imports_here=True), folder, setup)


def _forked(call: Callable[[], object], command: Command, folder: Path, setup: Callable[[], object]) -> str:
    with tempfile.TemporaryDirectory() as outputs:

        def rank() -> object:
            for name, stream in (("stdout", 1), ("stderr", 2)):
                path = f"{outputs}/{name}-{os.environ['RANK']}"
                os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.chdir(folder)
            # As in an activated environment.
            os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            os.environ.update(dict(command.variables))
            sys.path[:0] = [str(folder)] * command.imports_here
            setup()
            with _as_started(command.ranks):
                try:
                    code = call()
                except SystemExit as stop:
                    code = stop.code
            return 0 if (command.program, code) in _FINDINGS else code or 0

        try:
            codes = run_ranks(command.ranks, rank, timeout=_TIMEOUT_SECONDS)
        except RankFailure as failure:
            raise CommandError(f"{command.text}\n{failure}\n{_said(outputs, 'stderr')}") from None
        if any(codes) != command.refused:
            raise CommandError(f"{command.text} ended with {codes}\n{_said(outputs, 'stderr')}")
        return _said(outputs, "stdout") + _said(outputs, "stderr") * command.refused


@contextlib.contextmanager
def _as_started(ranks: int) -> Iterator[None]:
    """Makes of the group that `run_ranks` has prepared what a launcher leaves to a program."""
    if ranks > 1:  # the group is there already; a program that makes one and ends it finds that
        with patch.object(dist, "init_process_group", _ignore), patch.object(dist, "destroy_process_group", _ignore):
            yield
        return
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    yield
    dist.destroy_process_group = _ignore


def _ignore(*args: object, **kwargs: object) -> None:
    pass


def _said(outputs: str, stream: str) -> str:
    return "".join(path.read_text() for path in sorted(Path(outputs).glob(f"{stream}-*")))
