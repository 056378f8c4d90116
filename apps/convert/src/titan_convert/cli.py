"""`titan-convert COMMAND …`: reads the command line, has the command carried out, says what came of it.

Exit codes: 0 done, 1 not done, or `diff` and `verify` have found something (what, is on stderr or in the table), 2 the
command line is wrong, 130 interrupted, 141 nobody reads the output any more. Imports no torch before it is needed, so
that help and mistakes answer at once.
"""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from titan_ckpt.errors import CheckpointError
from titan_convert import __version__
from titan_convert.progress import ProgressLine

DTYPES = ("float32", "bfloat16", "float16", "float64")
KEYS = ("titan", "torchtitan", "torchtitan-0.2", "torchtune")
ASSETS = ("tokenizer", "config", "weights")
_BROKEN_PIPE = 141  # what a shell makes of SIGPIPE
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

# Command -> module and function that carry it out, and what it does.
COMMANDS = {
    "hf-to-dcp": ("titan_convert.commands:convert", "A Hugging Face folder (safetensors) into a checkpoint."),
    "dcp-to-hf": ("titan_convert.commands:convert", "A checkpoint into a folder that transformers loads."),
    "llama-to-dcp": ("titan_convert.commands:convert", "Meta's params.json and consolidated.NN.pth into a checkpoint."),
    "dcp-to-llama": ("titan_convert.commands:convert", "A checkpoint into Meta's params.json and consolidated.NN.pth."),
    "dcp-to-torch": (
        "titan_convert.commands:dcp_to_torch",
        "The tensors of a checkpoint folder (titan's, or any in PyTorch's DCP layout) into one torch.save file.",
    ),
    "torch-to-dcp": (
        "titan_convert.commands:torch_to_dcp",
        "A torch.save file of tensors, nested dicts or flat, into a checkpoint folder.",
    ),
    "inspect": ("titan_convert.show:inspect", "What a folder or file is: format, family, parameters, dtypes, sizes."),
    "diff": ("titan_convert.diff:diff", "Compares two models, of any formats: configurations, and tensor by tensor."),
    "verify": ("titan_convert.show:verify", "Whether a folder or file is whole: manifest, hashes, index, headers."),
    "download": ("titan_convert.download:command", "Fetches a repository from the Hugging Face hub."),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command in `arguments` (the process's own if None) and returns the exit code."""
    options = _parser().parse_args(arguments)
    module, _, function = COMMANDS[options.command][0].partition(":")
    try:
        with contextlib.closing(ProgressLine()) as progress:
            # torch and what it brings: seconds that a wrong option need not wait
            command: Callable[..., int] = getattr(importlib.import_module(module), function)
            code = command(options, progress)
            sys.stdout.flush()  # not when the process ends, where a reader that has gone would be a traceback
            return code
    except CheckpointError as error:
        print(f"titan-convert: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # of what is printed (`| head`): what is left of it is thrown away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except OSError as error:
        told = " ".join(str(error).split())
        print(f"titan-convert: {told}. Check names, permissions and the connection, and run again.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("titan-convert: interrupted; run again to go on, nothing has been replaced.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="titan-convert", description="Converts checkpoints between formats.")
    parser.add_argument("--version", action="version", version=f"titan-convert {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == "download":
            _download(command)
        elif "-to-" not in name:
            _look(command, name)
        else:
            _conversion(command, *name.split("-to-"))
    return parser


def _conversion(command: argparse.ArgumentParser, src: str, dst: str) -> None:
    kinds = {"hf": "folder", "llama": "folder", "torch": "file", "dcp": "folder"}
    command.add_argument("src", metavar="SRC", help=f"the {kinds[src]} to read; a path or a URL (s3://…)")
    command.add_argument("dst", metavar="DST", help=f"the {kinds[dst]} to write")
    command.add_argument("--overwrite", action="store_true", help="replace DST if it exists and was converted or saved")
    if dst != "torch":
        command.add_argument(
            "--restart", action="store_true", help="delete what an interrupted run has left, start anew"
        )
    if src != "torch":
        command.add_argument(
            "--no-verify-hashes", action="store_true", help="don't compare SRC's files with the hashes it came with"
        )
    if dst == "torch":
        command.add_argument(
            "--only", metavar="NAME", help="take just what is under NAME (`model`), and take `NAME.` off the keys"
        )
    elif src == "torch":
        command.add_argument(
            "--under", metavar="NAME", help="put `NAME.` before the keys: the object (`model`) they will be loaded into"
        )
    else:
        _between_models(command, src, dst)


def _between_models(command: argparse.ArgumentParser, src: str, dst: str) -> None:
    command.add_argument("--dtype", choices=DTYPES, help="of the result; default: as in SRC")
    side = "SRC" if src == "dcp" else "DST"
    command.add_argument("--keys", choices=KEYS, default="titan", help=f"whose names {side} has; default: titan")
    if src == "dcp":
        command.add_argument(
            "--config",
            metavar="PATH",
            help="a model.json, config.json or params.json, if SRC doesn't say what it holds",
        )
    if dst == "llama":
        command.add_argument("--shards", type=_positive, default=1, help="ranks of model parallelism; default: 1")
    if dst == "hf":
        command.add_argument("--shard-size", type=_bytes, default=10**9, help="of a file; default: 1GB")
    command.add_argument("--dry-run", action="store_true", help="print the table of names and shapes, write nothing")
    command.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compute logits on both sides, on a slice of the model, in a process of its own; default: if transformers "
        "is installed",
    )


def _look(command: argparse.ArgumentParser, name: str) -> None:
    if name == "diff":
        command.add_argument("one", metavar="A", help="a folder or file of weights")
        command.add_argument("other", metavar="B", help="another one")
        command.add_argument(
            "--config", metavar="PATH", help="the model, for a DCP folder that doesn't say what it holds"
        )
        command.add_argument(
            "--keys", choices=KEYS, default="titan", help="whose names a DCP side has, if not titan's; default: titan"
        )
    else:
        command.add_argument("path", metavar="PATH", help="a folder or file of weights; a path or a URL")
    if name == "inspect":
        command.add_argument("--tensors", action="store_true", help="list every tensor")


def _download(command: argparse.ArgumentParser) -> None:
    command.add_argument("repo", metavar="REPO", help="OWNER/NAME on the hub")
    command.add_argument("dst", metavar="DST", nargs="?", help="the folder to write; default: NAME")
    command.add_argument(
        "--assets", nargs="+", choices=ASSETS, default=list(ASSETS), help="what to fetch; default: all"
    )
    command.add_argument("--revision", help="a branch, tag or commit; default: main")
    command.add_argument("--token", help="of the hub; default: HF_TOKEN, or that of `hf auth login`")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _bytes(text: str) -> int:
    for unit, factor in _UNITS.items():
        if text.upper().endswith(unit):
            return _positive(text[: -len(unit)]) * factor
    return _positive(text)
