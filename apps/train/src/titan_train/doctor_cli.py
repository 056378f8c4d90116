"""`titan-doctor`: reads the command line, then imports torch.

Exit codes: 0 done, 1 failed or, with --strict, a rank is far from the others; 2 the command line is wrong, 130
interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from titan_train.command import FAILED, INTERRUPTED, USAGE, exit_with, is_for_the_user, override, said_once
from titan_train.config import TrainConfig
from titan_train.doctor_options import PROBES, Options
from titan_train.registry import DEFAULT_CONFIG, DEFAULT_MODULE, load_config

# What follows from the configuration, or from what all ranks have been told.
_RAISED_BY_ALL = (
    "titan_core.",
    "titan_train.command",
    "titan_train.config_file",
    "titan_train.doctor",
    "titan_train.registry",
)
_DEFAULTS = Options()
_DESCRIPTION = """\
Says what the ranks of a run find around them, measures what their devices, links, clocks and disks can do, and names
the ranks that are far from the others. It takes the flags of titan-train too, so that a run's own command line measures
its mesh and its checkpoint folder; --parallel.*, --device, --output and --checkpoint.directory count.

  torchrun --nproc-per-node 8 -m titan_train.doctor_cli --parallel.tp 4
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `titan-doctor`."""
    with said_once():
        known, rest = build_parser().parse_known_args(arguments)
    exit_with(lambda: _run(known, rest))


def _complain(error: Exception) -> None:
    """Prints what is for the user: what all ranks say alike once, on rank 0."""
    if type(error).__module__.startswith(_RAISED_BY_ALL):
        who = "titan-doctor" if _rank() == "0" else None
    else:
        who = f"titan-doctor (rank {_rank()})" if "RANK" in os.environ else "titan-doctor"
    if who is not None:
        print(f"{who}: {error}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """What may be typed beside the flags of titan-train."""
    parser = argparse.ArgumentParser(
        prog="titan-doctor",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--module", metavar="NAME", default=DEFAULT_MODULE, help="as titan-train takes it")
    parser.add_argument("--config", metavar="NAME", default=DEFAULT_CONFIG, help="as titan-train takes it")
    parser.add_argument(
        "--probes", nargs="+", choices=PROBES, default=_DEFAULTS.probes, metavar="PROBE", help=f"of {', '.join(PROBES)}"
    )
    parser.add_argument("--strict", action="store_true", help="end with 1 if a rank is far from the others")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with the number of every rank")
    parser.add_argument(
        "--slower-than",
        type=_share,
        default=_DEFAULTS.slower_than,
        metavar="SHARE",
        help="a rank is flagged if its rate is lower than the ranks' median by more than this share; default: 0.2",
    )
    parser.add_argument(
        "--clock-seconds",
        type=_seconds,
        default=_DEFAULTS.clock_seconds,
        metavar="SECONDS",
        help="a rank is flagged if its clock is further than this from the ranks' median; default: 0.1",
    )
    parser.add_argument(
        "--megabytes",
        type=_count,
        default=_DEFAULTS.megabytes,
        metavar="N",
        help="of messages, copies and files; default: 64",
    )
    parser.add_argument(
        "--repetitions", type=_count, default=_DEFAULTS.repetitions, metavar="N", help="the median counts; default: 10"
    )
    return parser


def _run(known: argparse.Namespace, rest: Sequence[str]) -> int:
    try:
        return _examine(known, rest)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if not is_for_the_user(error):
            raise
        _complain(error)
        return USAGE if isinstance(error, ValueError) else FAILED


def _examine(known: argparse.Namespace, rest: Sequence[str]) -> int:
    config = _configuration(known, rest)
    from titan_train.doctor import examine
    from titan_train.doctor_text import as_json, as_text

    options = Options(
        probes=tuple(known.probes),
        slower_than=known.slower_than,
        clock_seconds=known.clock_seconds,
        megabytes=known.megabytes,
        repetitions=known.repetitions,
    )
    findings = examine(config, options)
    if _rank() == "0":
        print(as_json(findings) if known.json else as_text(findings, options))
    return FAILED if known.strict and findings.outliers else 0


def _configuration(known: argparse.Namespace, rest: Sequence[str]) -> TrainConfig:
    config = load_config(known.module, known.config)
    return override(config, rest, program="titan-doctor", description=_DESCRIPTION, own=build_parser())


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share; use a number between 0 and 1, such as 0.2")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a time; use a number of seconds above 0, such as 0.1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 2**20:
        raise argparse.ArgumentTypeError(f"{text} is out of range; use 1 to {2**20}")
    return value


if __name__ == "__main__":
    main()
