"""`titan-train`: reads the command line, checks it, and only then imports torch and trains."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from titan_train.command import CHOICE, FAILED, INTERRUPTED, USAGE, exit_with, is_for_the_user, override
from titan_train.config import TrainConfig
from titan_train.config_file import to_json
from titan_train.configure import configure
from titan_train.interrupt import Interrupt, Preempted, end_with_launcher
from titan_train.registry import DEFAULT_CONFIG
from titan_train.validate import validate

_DESCRIPTION = f"""\
Trains a model. Start it with torchrun for more than one process:
  torchrun --nproc-per-node 2 -m titan_train --parallel.dp-shard 2

{CHOICE}--print-config   print the resolved configuration as JSON and stop
--explain        print what the layout makes of the model: meshes, placements, pipeline, communication; and stop
--dry-run        rehearse a step on fake tensors, print the memory of the heaviest rank; and stop
--world-size N   the number of ranks that --explain and --dry-run suppose (default: those that were started)
"""

# What follows from the configuration or from what ranks have agreed on, so that all of them raise it.
_RAISED_BY_ALL = (
    "titan_train.validate",
    "titan_train.resume",
    "titan_train.origin",
    "titan_train.configure",
    "titan_train.guard",
    "titan_ckpt.",
)

_PREEMPTED = 75  # EX_TEMPFAIL, "try again later"


class UsageError(ValueError):
    """Arguments that contradict each other."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `titan-train`; exits with 0, 1 (failed), 2 (wrong usage), 75 (preempted) or 130 (interrupted)."""
    exit_with(lambda: run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Like `main`, but returns the exit code of everything except wrong usage."""
    try:
        parser = _parser()
        chosen, rest = parser.parse_known_args(arguments)
        config = configure(
            chosen.module,
            chosen.config,
            rest,
            override=partial(override, program="titan-train", description=_DESCRIPTION, own=parser),
        )
        world_size = _supposed_world_size(chosen)
        validate(config, world_size)
        if chosen.print_config:
            print(to_json(config), end="")
            return 0
    except ValueError as error:
        _complain(error, on_rank=0)  # every rank was given the same command line
        return USAGE
    rehearsing = chosen.explain or chosen.dry_run
    try:
        if rehearsing:
            print(_rehearsed(config, world_size, chosen))
            return 0
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_launcher()
        with Interrupt(alone=_world_size() == 1) as interrupt:
            from titan_train.trainer import train

            return _exit_code(train(config, interrupt, name=_run_name(chosen.config or DEFAULT_CONFIG)))
    except Preempted:
        return _exit_code(signal.SIGTERM)
    except KeyboardInterrupt:
        return _exit_code(signal.SIGINT)
    except Exception as error:
        _complain(error)
        return USAGE if rehearsing and isinstance(error, ValueError) else FAILED


def _exit_code(ended_by: signal.Signals | None) -> int:
    if ended_by is None or "TORCHELASTIC_RUN_ID" in os.environ:
        return 0  # torchrun would take any other code for a failure, and start the workers again
    return INTERRUPTED if ended_by == signal.SIGINT else _PREEMPTED


def _supposed_world_size(chosen: argparse.Namespace) -> int:
    if chosen.world_size is None:
        return _world_size()
    if not (chosen.explain or chosen.dry_run):
        raise UsageError(
            "--world-size is a supposition for --explain and --dry-run; a run has as many ranks as were started. Add "
            "one of them, or start ranks with torchrun --nproc-per-node."
        )
    if chosen.world_size < 1:
        raise UsageError(f"--world-size is {chosen.world_size}; it must be at least 1.")
    return chosen.world_size


def _rehearsed(config: TrainConfig, world_size: int, chosen: argparse.Namespace) -> str:
    texts = []
    if chosen.explain:
        from titan_train.explain import explanation_text

        texts.append(explanation_text(config, world_size))
    if chosen.dry_run:
        from titan_train.dry_run import dry_run_text

        texts.append(dry_run_text(config, world_size))
    return "\n\n".join(texts)


def _complain(error: Exception, on_rank: int | None = None) -> None:
    """Prints what is for the user: what titan's own packages and the operating system say; the rest is raised."""
    if not is_for_the_user(error):
        raise error
    rank = int(os.environ.get("RANK", "0"))
    module = type(error).__module__
    if module.startswith(_RAISED_BY_ALL) or (isinstance(error, ValueError) and module.startswith("titan_core.")):
        on_rank = 0
    if type(error).__name__ == "MainRankError" or on_rank not in (None, rank):
        return
    who = f"titan-train (rank {rank})" if _world_size() > 1 and on_rank is None else "titan-train"
    print(f"{who}: {error}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="titan-train", add_help=False, allow_abbrev=False)
    parser.add_argument("--module")
    parser.add_argument("--config")
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--explain", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--world-size", type=int)
    return parser


def _run_name(config: str) -> str:
    return Path(config).resolve().parent.name if config.endswith(".json") else config


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
