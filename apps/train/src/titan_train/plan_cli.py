"""`titan-plan`: the memory of a training step before it is paid for, by arithmetic: no GPU, no torch, a second.

Exit codes: 0 done, 1 nothing fits, 2 the command line or the configuration is wrong.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from titan_train.command import CHOICE, USAGE, exit_with, is_for_the_user, override
from titan_train.config import TrainConfig
from titan_train.configure import configure
from titan_train.plan import plan, plans_by_remat
from titan_train.plan_fit import Fit, fit
from titan_train.plan_text import fit_json, fit_text, plan_json, plan_text
from titan_train.registry import DEFAULT_CONFIG
from titan_train.validate import validate

_NOTHING_FITS = 1
_DESCRIPTION = f"""\
Tells what a training step takes of each rank's memory, without a GPU and without other ranks:
  titan-plan --config llama3_405b --world-size 16384 --parallel.tp 8 --parallel.pp 16 --remat.mode full

{CHOICE}--world-size N   number of ranks
--fit GB         list the layouts of so many ranks that fit into a GPU with GB x 10^9 bytes
--json           print everything for a machine
"""


class UsageError(ValueError):
    """Arguments that say nothing sensible."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `titan-plan`."""
    exit_with(lambda: run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Like `main`, but returns the exit code of everything except misspelt arguments."""
    parser = _parser()
    chosen, rest = parser.parse_known_args(arguments)
    try:
        _check_config(chosen.config)
        config = configure(
            chosen.module,
            chosen.config,
            rest,
            override=partial(override, program="titan-plan", description=_DESCRIPTION, own=parser),
        )
        _check(chosen)
        fitted = None if chosen.fit is None else fit(config, chosen.world_size, int(chosen.fit * 1e9))
        print(_answer(config, chosen, fitted))
    except (ValueError, OSError) as error:
        if not is_for_the_user(error):
            raise
        print(f"titan-plan: {error}", file=sys.stderr)
        return USAGE
    return 0 if fitted is None or fitted.fitting else _NOTHING_FITS


def _answer(config: TrainConfig, chosen: argparse.Namespace, fitted: Fit | None) -> str:
    name, world_size = chosen.config or DEFAULT_CONFIG, chosen.world_size
    if fitted is not None:
        return fit_json(fitted) if chosen.json else fit_text(fitted, name)
    validate(config, world_size)
    found, by_remat = plan(config, world_size), plans_by_remat(config, world_size)
    return plan_json(config, found, by_remat) if chosen.json else plan_text(config, found, by_remat, name)


def _check_config(name: str | None) -> None:
    if name and Path(name, "config.json").is_file():
        raise UsageError(f"--config {name} is a run directory; give its {Path(name, 'config.json')}.")


def _check(chosen: argparse.Namespace) -> None:
    if chosen.world_size is None:
        raise UsageError("titan-plan needs --world-size, the number of ranks to plan for; a rank is one GPU.")
    if chosen.world_size < 1:
        raise UsageError(f"--world-size is {chosen.world_size}; it must be at least 1.")
    if chosen.fit is not None and not (math.isfinite(chosen.fit) and chosen.fit > 0):
        raise UsageError(f"--fit is {chosen.fit:g}; give the memory of one GPU in GB (10^9 bytes), such as --fit 80.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="titan-plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--module")
    parser.add_argument("--config")
    parser.add_argument("--world-size", type=int)
    parser.add_argument("--fit", type=float, metavar="GB")
    parser.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    main()
