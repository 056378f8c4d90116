"""What this app's commands do alike: flags over a configuration, words said once, a reader who has seen enough."""

import argparse
import contextlib
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import tyro

from titan_train import flags
from titan_train.config import TrainConfig
from titan_train.registry import DEFAULT_CONFIG, DEFAULT_MODULE, builtin_modules

FAILED, USAGE, INTERRUPTED = 1, 2, 130
_BROKEN_PIPE = 141  # what a shell makes of SIGPIPE

CHOICE = """\
--module NAME    module of configurations: {modules}, an importable module, or a .py file (default {module})
--config NAME    a function in it, or a run's config.json (default {config})
"""
"""Help of what chooses a configuration, for `override`."""


class FlagError(ValueError):
    """A flag that does not exist, spelt much as one that a command has of its own."""


def exit_with(run: Callable[[], int]) -> NoReturn:
    """Ends the process with the exit code that `run` returns, also if nobody reads to the end what it prints."""
    try:
        try:
            code = run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = _BROKEN_PIPE
    sys.exit(code)


def override(
    config: TrainConfig,
    arguments: Sequence[str],
    *,
    program: str,
    description: str,
    own: argparse.ArgumentParser | None = None,
) -> TrainConfig:
    """`config` with dotted flags over it; ends the process for --help, and for arguments that are none of its fields.

    `description` is the help's; `{modules}`, `{module}` and `{config}` in it stand for what there is and the defaults.
    `own` has parsed what the command takes beside them, of which the parser of the fields knows nothing.

    Raises:
        FlagError: if a flag is nearly one of the command's own.
    """
    if own is not None:
        _check_spelling(arguments, own)
    names = {"modules": ", ".join(builtin_modules()), "module": DEFAULT_MODULE, "config": DEFAULT_CONFIG}
    with said_once():
        return tyro.cli(
            type(config),
            prog=program,
            description=description.format(**names),
            default=config,
            args=list(arguments),
            config=(tyro.conf.AvoidSubcommands,),
            registry=flags.registry(),
        )


def _check_spelling(arguments: Sequence[str], own: argparse.ArgumentParser) -> None:
    known = re.findall(r"--[a-z-]+", own.format_usage())
    fields = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(TrainConfig)}
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and "." not in flag and flag not in fields:
            for meant in difflib.get_close_matches(flag, known, 1, cutoff=0.7):
                raise FlagError(f"There is no {flag}. Did you mean {meant}? --help lists all flags.")


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Lets rank 0 alone say what is the same for all ranks, such as what is wrong with their command line."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        contextlib.redirect_stdout(nowhere),
    ):
        yield


def is_for_the_user(error: Exception) -> bool:
    """Whether titan's own packages or the operating system say it; of the rest, the traceback tells more.

    What a closed pipe says is for `exit_with`.
    """
    said_by_system = isinstance(error, OSError) and not isinstance(error, BrokenPipeError)
    return said_by_system or type(error).__module__.startswith("titan_")
