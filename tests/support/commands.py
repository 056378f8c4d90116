"""Understands the commands of a page: takes a line apart, and parses its flags as the program does; runs nothing."""

import argparse
import contextlib
import importlib
import io
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tyro
from torch.distributed.run import get_args_parser

from titan_train import cli, flags
from titan_train.configs.llama3 import llama3_debug

ROOT = Path(__file__).parents[2]


def _programs() -> dict[str, str]:
    found = {}
    for project in [*ROOT.glob("packages/*/pyproject.toml"), *ROOT.glob("apps/*/pyproject.toml")]:
        found |= tomllib.loads(project.read_text())["project"].get("scripts", {})
    return found


PROGRAMS = _programs()
"""Name of each command of titan -> module:function."""
SHELL = ("cat", "cp", "ls", "mkdir")
"""What a shell may run."""
FOREIGN = ("pip", "uv", "uvx", "git", "sbatch", "sky", "kubectl", "torchft_lighthouse", "export")
"""What is neither ours nor run: only in a block with a mark."""


class CommandError(AssertionError):
    """A command of a page is not understood, or has failed."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One line, taken apart."""

    text: str
    program: str
    """A program of titan, a Python file, or something else."""
    arguments: tuple[str, ...] = ()
    ranks: int = 1
    variables: tuple[tuple[str, str], ...] = ()
    imports_here: bool = False
    """Whether modules of the current folder can be imported, as with `python -m`."""
    refused: bool = False
    """Whether the page says so, in a comment behind it."""


def parse(line: str) -> Command:
    """Takes a line apart.

    Raises:
        CommandError: if torchrun is told what it does not know, or starts what is no program of titan.
    """
    words = shlex.split(line, comments=True)
    variables = []
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        variables.append((name, value))
    if words[:2] == ["uv", "run"]:
        words = words[2:]
        while words[0] in ("--group", "--with"):
            words = words[2:]
    program, *arguments = words
    imports_here, ranks = "-m" in arguments or ("PYTHONPATH", ".") in variables, 1
    if program == "torchrun":
        program, arguments, ranks = _started_by_torchrun(arguments)
    elif program == "python":
        program, arguments = _started_by_python(arguments)
    return Command(
        text=line,
        program=program,
        arguments=tuple(arguments),
        ranks=ranks,
        variables=tuple(variables),
        imports_here=imports_here,
        refused=line.endswith("# refused"),
    )


def _started_by_torchrun(arguments: Sequence[str]) -> tuple[str, list[str], int]:
    with _exits_said(f"torchrun {shlex.join(arguments)}"):
        known = get_args_parser().parse_args(list(arguments))
    ranks = int(known.nnodes.rpartition(":")[2]) * int(known.nproc_per_node)
    script = ["-m", known.training_script] if known.module else [known.training_script]
    program, rest = _started_by_python([*script, *known.training_script_args])
    return program, rest, ranks


def _started_by_python(arguments: Sequence[str]) -> tuple[str, list[str]]:
    if arguments[0] != "-m":
        return arguments[0], list(arguments[1:])
    module = "titan_train.cli" if arguments[1] == "titan_train" else arguments[1]
    for name, target in PROGRAMS.items():
        if target.partition(":")[0] == module:
            return name, list(arguments[2:])
    raise CommandError(f"python -m {arguments[1]} is no program of titan.")


def main_of(program: str) -> Callable[[], object]:
    """The function behind a program of titan, which reads `sys.argv`."""
    module, _, function = PROGRAMS[program].partition(":")
    return getattr(importlib.import_module(module), function)


def check_flags(command: Command, folder: Path) -> None:
    """Parses and validates a command's flags as its program would, for its number of ranks, and runs nothing.

    `folder` is where it would be run.

    Raises:
        CommandError: with what the program says.
    """
    program, arguments = command.program, command.arguments
    environment = {"WORLD_SIZE": str(command.ranks), **dict(command.variables)}
    with contextlib.chdir(folder), _nothing_imported(), patch.dict(os.environ, environment), _exits_said(command.text):
        sys.path[:0] = [str(folder)] * command.imports_here
        if program in PROGRAMS:
            _check_program(command)
        elif program.startswith("scripts/") and program.endswith(".sh"):
            _check_launcher(program, arguments)
        elif program == "sbatch":
            script = next(i for i, word in enumerate(arguments) if word.startswith("scripts/"))
            _check_launcher(arguments[script], arguments[script + 1 :])
        elif program == "pip":
            _check_packages(arguments)
        elif program.endswith(".py"):
            if not Path(program).is_file():
                raise CommandError(f"{command.text}: {program} does not exist.")
        elif program not in (*SHELL, *FOREIGN):
            raise CommandError(f"{command.text}: {program} is no program that is known.")


def _check_program(command: Command) -> None:
    if command.program == "titan-train":
        check_training(command.arguments)
        return
    known, rest = _asked(command)
    if command.program in ("titan-plan", "titan-doctor"):  # which leave the rest to titan-train's
        world_size = getattr(known, "world_size", None) or command.ranks
        named = {f"--{name}": getattr(known, name) for name in ("module", "config")}
        chosen = [word for name, value in named.items() if value for word in (name, value)]
        with patch.dict(os.environ, {"WORLD_SIZE": str(world_size)}):
            check_training([*chosen, *rest])
    elif rest:
        raise CommandError(f"{command.text}: {command.program} does not know {shlex.join(rest)}.")


def check_training(arguments: Sequence[str]) -> None:
    """Configures and validates as titan-train does, for $WORLD_SIZE ranks or --world-size.

    Raises:
        CommandError: with the program's words.
    """
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = cli.run([*arguments, "--print-config"])
    if code != 0:
        raise CommandError(f"titan-train {shlex.join(arguments)}\n{said.getvalue()}")


def check_spelling(arguments: Sequence[str]) -> None:
    """Whether titan-train knows these flags and their values, whatever else they would need.

    Raises:
        CommandError: with the program's words.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--module", "--config", "--world-size"):
        parser.add_argument(name)
    for name in ("--print-config", "--explain", "--dry-run"):
        parser.add_argument(name, action="store_true")
    _, rest = parser.parse_known_args(list(arguments))
    with _exits_said(shlex.join(arguments)):
        config = llama3_debug()
        registry = flags.registry()
        tyro.cli(type(config), default=config, args=rest, config=(tyro.conf.AvoidSubcommands,), registry=registry)


def _check_launcher(script: str, arguments: Sequence[str]) -> None:
    """run_train.sh takes flags, ssh.sh a file of hosts, a run directory and flags, the others a directory and flags."""
    if not (ROOT / script).is_file():
        raise CommandError(f"{script} does not exist.")
    check_training(arguments[{"run_train.sh": 0, "ssh.sh": 2}.get(Path(script).name, 1) :])


def _check_packages(arguments: Sequence[str]) -> None:
    """That packages of this repository are where pip is told to look, and have the extras that it is told."""
    for word in arguments:
        path, _, extras = word.partition("[")
        ours = re.fullmatch(r"(?:\./(?:packages|apps)/|titan-)([\w-]+)", path)
        if ours is None:
            continue
        found = [ROOT / path] if path.startswith("./") else [ROOT / "packages" / path, ROOT / "apps" / ours[1]]
        project = next((folder / "pyproject.toml" for folder in found if (folder / "pyproject.toml").is_file()), None)
        if project is None:
            raise CommandError(f"pip: there is no {path}.")
        known = tomllib.loads(project.read_text())["project"].get("optional-dependencies", {})
        if unknown := set(filter(None, extras.rstrip("]").split(","))) - known.keys():
            raise CommandError(f"{path} has no extra {', '.join(unknown)}; it has {', '.join(known)}.")


class _AskedError(Exception):
    """Carries what a parser has made of a command line out of the program that asked it."""


def _asked(command: Command) -> tuple[argparse.Namespace, list[str]]:
    """What the program's own parser makes of the arguments, and those it leaves to another one."""
    parse_known, depth = argparse.ArgumentParser.parse_known_args, 0

    def parse(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> object:
        nonlocal depth
        depth += 1
        try:
            found = parse_known(self, *args, **kwargs)
        finally:
            depth -= 1
        if depth == 0:  # not that of a subcommand
            raise _AskedError(found)
        return found

    words = [command.program, *command.arguments]
    with patch.object(argparse.ArgumentParser, "parse_known_args", parse), patch.object(sys, "argv", words):
        try:
            main_of(command.program)()
        except _AskedError as asked:
            return asked.args[0]
    raise CommandError(f"{command.text}: {command.program} does not look at its arguments.")


@contextlib.contextmanager
def _exits_said(text: str) -> Iterator[None]:
    """Makes an error of an exit, with what went to standard error."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            yield
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise CommandError(f"{text}\n{said.getvalue()}") from None


@contextlib.contextmanager
def _nothing_imported() -> Iterator[None]:
    """Forgets the modules below the current folder at the end: the next command has to find them for itself."""
    known = set(sys.modules)
    with patch.object(sys, "path", [*sys.path]):
        try:
            yield
        finally:
            for name in sys.modules.keys() - known:
                if Path.cwd() in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
                    del sys.modules[name]
