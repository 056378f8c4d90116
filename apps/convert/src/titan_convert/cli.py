"""`titan-convert COMMAND SRC DST`: reads the command line, calls the engine in titan-ckpt, says what came of it.

Exit codes: 0 done, 1 not done (one paragraph on stderr says why), 2 the command line is wrong, 130 interrupted.
Imports no torch before it is needed, so that help and mistakes answer at once.
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from titan_ckpt.errors import CheckpointError
from titan_convert import __version__
from titan_convert.progress import ProgressLine, size_text

if TYPE_CHECKING:
    from titan_ckpt.convert import Converted

_SHOWN = 8  # keys of what was left out; the rest are counted


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command in `arguments` (the process's own if None) and returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        with contextlib.closing(ProgressLine()) as progress:
            converted = _convert(options, progress)
    except CheckpointError as error:
        print(f"titan-convert: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"titan-convert: interrupted; {options.dst} is as it was.", file=sys.stderr)
        return 130
    for line in _summary(options.dst, converted):
        print(line)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="titan-convert", description="Converts checkpoints between formats.")
    parser.add_argument("--version", action="version", version=f"titan-convert {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    text = "The tensors of a checkpoint folder (titan's, or any in PyTorch's DCP layout) into one torch.save file."
    command = commands.add_parser("dcp-to-torch", help=text, description=text)
    command.add_argument("src", type=Path, metavar="SRC", help="the folder, for instance checkpoints/step-500")
    command.add_argument("dst", type=Path, metavar="DST", help="the file to write, for instance model.pt")
    command.add_argument(
        "--only", metavar="NAME", help="take just what is under NAME (`model`), and take `NAME.` off the keys"
    )
    command.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    command.add_argument(
        "--no-verify-hashes", action="store_true", help="don't compare the files' SHA-256 with the manifest"
    )

    text = "A torch.save file of tensors, nested dicts or flat, into a checkpoint folder."
    command = commands.add_parser("torch-to-dcp", help=text, description=text)
    command.add_argument("src", type=Path, metavar="SRC", help="the file, for instance model.pt")
    command.add_argument("dst", type=Path, metavar="DST", help="the folder to write, for instance checkpoints/step-0")
    command.add_argument(
        "--under", metavar="NAME", help="put `NAME.` before the keys: the object (`model`) they will be loaded into"
    )
    command.add_argument("--overwrite", action="store_true", help="replace DST if it is a checkpoint")
    return parser


def _convert(options: argparse.Namespace, progress: ProgressLine) -> "Converted":
    from titan_ckpt.convert import dcp_to_torch, torch_to_dcp  # torch: seconds that a wrong option need not wait

    if options.command == "dcp-to-torch":
        return dcp_to_torch(
            options.src,
            options.dst,
            only=options.only,
            overwrite=options.overwrite,
            verify_hashes=not options.no_verify_hashes,
            progress=progress,
        )
    return torch_to_dcp(options.src, options.dst, under=options.under, overwrite=options.overwrite, progress=progress)


def _summary(dst: Path, converted: "Converted") -> list[str]:
    verified = ", the source verified by its manifest" if converted.verified else ""
    lines = [f"wrote {dst}: {converted.tensors:,} tensors, {size_text(converted.size)}{verified}"]
    if converted.left_out:
        shown = ", ".join(converted.left_out[:_SHOWN])
        more = len(converted.left_out) - _SHOWN
        lines.append(f"left out, for they are no tensors: {shown}" + (f" and {more} more" if more > 0 else ""))
    return lines
