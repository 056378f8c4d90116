"""`titan-report RUN [RUN …]`: writes the page of some runs, or shows it live in the browser.

Exit codes: 0 done (also when a live page is ended with Ctrl-C), 1 not done (why, is on stderr), 2 the command line is
wrong, 130 interrupted.
"""

import argparse
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from titan_metrics import __version__
from titan_metrics.report.document import build, page
from titan_metrics.report.files import ReportError
from titan_metrics.report.run import open_runs
from titan_metrics.report.server import serve

PORT = 8477
"""Where a live page is, if no port is named."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what `arguments` (the process's own if None) ask for and returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.steps and options.steps[0] > options.steps[1]:
        parser.error(f"--steps {options.steps[0]} {options.steps[1]}: the first step comes after the last.")

    def announce(address: str) -> None:
        _say(f"{address} shows the run while it goes on; Ctrl-C ends it.")
        if options.watch:
            webbrowser.open(address)

    try:
        runs = open_runs(options.runs, tuple(options.steps) if options.steps else None)
        if options.watch or options.serve is not None:
            serve(runs, PORT if options.serve is None else options.serve, announce)
        else:
            _write(options.output, page(build(runs)))
    except ReportError as error:
        sys.stderr.write(f"titan-report: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ReportError(
            f"Cannot write {path}: {error.strerror}. Name a file in a folder that you may write to with --output."
        ) from error
    _say(f"{path}: {len(text.encode()) / 1e6:.1f} MB")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()  # a program that reads the address waits for it


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="titan-report", description="One page about one or more runs, that opens from disk and loads nothing."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run directory")
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page (default: report.html)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="the steps of the timeline (default: the latest; others take longer to find)",
    )
    parser.add_argument(
        "--serve",
        type=int,
        nargs="?",
        const=PORT,
        metavar="PORT",
        help=f"show the runs while they go on, on a port of this machine (default: {PORT}; 0: any that is free)",
    )
    parser.add_argument("--watch", action="store_true", help="as --serve, and open the page in the browser")
    parser.add_argument("--version", action="version", version=f"titan-report {__version__}")
    return parser
