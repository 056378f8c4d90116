"""`titan-generate`: text from a run, a checkpoint or a Hugging Face folder; reads the command line, then imports torch.

Exit codes: 0 done, 1 failed, 2 the command line is wrong, 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from titan_train.command import FAILED, INTERRUPTED, USAGE, exit_with, is_for_the_user

_DESCRIPTION = """\
Writes text from the weights in PATH: a run's directory, a checkpoint, or a Hugging Face folder. With torchrun the ranks
share the model by tensor parallelism:

  torchrun --nproc-per-node 2 -m titan_train.generate_cli PATH --prompt TEXT
"""


class UsageError(ValueError):
    """Options that would have no effect beside the others."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `titan-generate`."""
    options = build_parser().parse_args(arguments)
    exit_with(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    try:
        _check(options)
        from titan_train.generate import generate_text

        return generate_text(options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if not is_for_the_user(error):
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"titan-generate: {error}", file=sys.stderr)
        return USAGE if isinstance(error, ValueError) else FAILED


def _check(options: argparse.Namespace) -> None:
    if options.seed is not None and options.temperature == 0:
        raise UsageError("--seed fixes what is drawn, and --temperature 0 draws nothing; give a higher one, such as 1.")
    for name in ("system", "template"):
        if getattr(options, name) is not None and not options.chat:
            raise UsageError(f"--{name} is for conversations; add --chat, or leave it out.")
    if options.bos is not None and options.chat:
        raise UsageError("--bos and --no-bos have no effect with --chat: the template begins a text; leave them out.")


def build_parser() -> argparse.ArgumentParser:
    """What may be typed."""
    parser = argparse.ArgumentParser(
        prog="titan-generate", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="PATH", help="where the weights are; a path or a URL")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", action="append", metavar="TEXT", help="what to go on from; may be given repeatedly")
    given.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with a prompt in each line")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="of each text; default: 100")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the most probable token (default)")
    parser.add_argument("--top-k", type=int, default=0, help="choose among so many most probable tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="choose among those that have this share together")
    parser.add_argument("--seed", type=int, help="fixes what is drawn, with --temperature; default: 0")
    parser.add_argument("--chat", action="store_true", help="prompts are what a user says, in the chat template")
    parser.add_argument("--system", metavar="TEXT", help="what the system says before, with --chat")
    parser.add_argument("--template", help="with --chat; default: the one beside the tokenizer")
    parser.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="begin with the token that begins a text; default: for a Hugging Face folder whose tokenizer has one",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float64"), help="default: bfloat16 on a GPU, float32"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--verify-hashes", action=argparse.BooleanOptionalAction, default=True, help="of the weights")
    return parser


if __name__ == "__main__":
    main()
