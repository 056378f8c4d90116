"""`titan-tokenize`: tokenizes a corpus into a folder that training maps into memory, with no tokenizer at work.

titan-tokenize SOURCE FOLDER --tokenizer tokenizer.json
titan-tokenize FOLDER --verify
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from titan_data.config import DataConfig, Format

_DEFAULT_SHARD_MB = 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.source is None and not options.verify:
        parser.error("name a SOURCE and a FOLDER; a FOLDER alone goes with --verify")

    # After the options, so that --help answers at once.
    from titan_data.errors import DataError

    try:
        if options.source is not None:
            _tokenize(options)
        if options.verify:
            _verify(options.folder)
    except DataError as error:
        _say(f"titan-tokenize: {error}")
        return 1
    except KeyboardInterrupt:
        _say("titan-tokenize: interrupted; the same command goes on from what is finished")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="titan-tokenize",
        description="Tokenizes a corpus into a folder of token files, which titan-train takes as --data.source. "
        "Killed half-way, the same command goes on from what is finished. The result is the same for any number of "
        "workers.",
    )
    parser.add_argument(
        "source", nargs="?", metavar="SOURCE", help="what data.source may be: file, folder, glob, URL, ..."
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the tokens go; created if it is missing")
    parser.add_argument("--tokenizer", default=DataConfig.tokenizer, help='path of a tokenizer, or "bpe" to train one')
    parser.add_argument("--vocab-size", type=int, default=DataConfig.vocab_size, help="of the trained BPE")
    parser.add_argument("--format", choices=get_args(Format), default="auto", help="how to read files (by suffix)")
    parser.add_argument("--text-field", default=DataConfig.text_field, help="the field or column with the text")
    parser.add_argument("--template", help='text put together from fields: "{question}\\n{answer}"')
    parser.add_argument(
        "--workers", type=_at_least_1, default=os.cpu_count() or 1, help="processes (one for each core)"
    )
    parser.add_argument(
        "--shard-mb", type=_at_least_1, default=_DEFAULT_SHARD_MB, help="megabytes of text in a shard, about"
    )
    parser.add_argument("--cache-dir", help="for trained tokenizers, hashes and copies of remote files")
    parser.add_argument("--verify", action="store_true", help="read the folder's files again and compare their hashes")
    return parser


def _at_least_1(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few; it takes at least 1")
    return number


def _tokenize(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from titan_data.cache import cache_directory, exclusive, writing_to
    from titan_data.dataset import open_tokenizer
    from titan_data.errors import DataError
    from titan_data.source import source_bytes
    from titan_data.sources import open_source
    from titan_data.tokenizing import check_folder, tokenize_source

    config = DataConfig(
        source=options.source,
        format=options.format,
        text_field=options.text_field,
        template=options.template,
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
    )
    cache = cache_directory(options.cache_dir)
    source = open_source(config, cache=cache, progress=_say)
    tokenizer = open_tokenizer(config, source, cache=cache, progress=_say)
    folder: Path = options.folder
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file, and tokens go into a folder. Name another.")
    shard_bytes = options.shard_mb * 1_000_000
    check_folder(folder, source, tokenizer, shard_bytes=shard_bytes)  # before anything is written there
    with (
        writing_to(folder, what="the tokens", remedy="name another FOLDER"),
        exclusive(folder / "tokenize", what="tokens", progress=_say),
        tqdm(total=source_bytes(source), unit="B", unit_scale=True, desc="tokenizing") as bar,
    ):
        tokens = 0

        def report(size: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
            bar.update(size)

        manifest = tokenize_source(
            folder,
            source,
            tokenizer,
            workers=options.workers,
            shard_bytes=shard_bytes,
            report=report,
        )
    _say(
        f"{folder}: {manifest.tokens:,} tokens in {manifest.documents:,} documents, {len(manifest.shards)} shards of "
        f"{manifest.token_type}, tokenized on {manifest.tokenizer.engine}"
    )
    if left_out := manifest.empty_documents:
        _say(f"{left_out:,} empty documents left out")


def _verify(folder: Path) -> None:
    from titan_data.cache import DamagedError
    from titan_data.errors import DataError, NotFoundError
    from titan_data.manifest import is_token_folder
    from titan_data.token_store import verify_store

    if folder.exists() and not is_token_folder(folder) and not any(folder.glob("shard-*.tokens.bin")):
        raise DataError(
            f"{folder} is no folder of tokens: no shard-*.tokens.bin is in it. Name one that titan-tokenize wrote."
        )
    try:
        manifest = verify_store(folder).manifest
    except FileNotFoundError as error:
        raise NotFoundError(f"{folder} does not exist") from error
    except DamagedError as error:
        raise DataError(f"{folder} is damaged: {error}. Tokenize the corpus again.") from error
    _say(f"{folder}: whole; {len(manifest.files)} files are as they were written, fingerprint {manifest.fingerprint}")


def _say(message: str) -> None:
    sys.stderr.write(f"{message}\n")
