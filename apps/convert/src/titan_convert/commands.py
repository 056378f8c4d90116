"""What the converting commands do once the command line is read."""

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Mapping

from titan_ckpt.conversion import torch_files as plain
from titan_ckpt.conversion.plan import Plan, Proof, run
from titan_ckpt.conversion.survey import verifying
from titan_ckpt.errors import CheckpointError
from titan_ckpt.formats.collection import listed
from titan_ckpt.location import place_of
from titan_ckpt.manifest import Json
from titan_ckpt.place import Place
from titan_convert.check import prove
from titan_convert.convert import Options, plan
from titan_convert.progress import ProgressLine, size_text


def convert(options: argparse.Namespace, progress: ProgressLine) -> int:
    """One of the commands between formats of models."""
    chosen = Options(
        keys=options.keys,
        config=getattr(options, "config", None),
        dtype=options.dtype,
        shards=getattr(options, "shards", 1),
        shard_bytes=getattr(options, "shard_size", Options.shard_bytes),
    )
    checked = _wants_check(options)
    src, dst = place_of(options.src), place_of(options.dst)
    planned = plan(options.command, src, dst, chosen)
    if options.dry_run:
        return _print_table(planned)
    check = _check(options, src, chosen) if checked else None
    compared = False
    with contextlib.nullcontext(lambda: False) if options.no_verify_hashes else verifying(src) as confirm:

        def examine(work: Place) -> Mapping[str, Json]:
            nonlocal compared
            compared = confirm()
            return check(work) if check is not None else {}

        kept = run(planned, overwrite=options.overwrite, restart=options.restart, prove=examine, progress=progress)
    verified = ", the source verified by its hashes" if compared else ""
    again = f", {size_text(kept)} of it from the run before" if kept else ""
    print(f"wrote {dst}: {planned.tensors:,} tensors, {size_text(planned.nbytes)}{again}{verified}")
    return 0


def _wants_check(options: argparse.Namespace) -> bool:
    if options.dry_run or options.check is False:
        return False
    needed = "hf" in options.command.split("-to-")  # Meta's format is checked without transformers
    if not needed or importlib.util.find_spec("transformers") is not None:
        return True
    if options.check:
        raise CheckpointError("--check needs transformers: pip install 'titan-convert[check]'.")
    print("not checked against transformers, which is not installed", file=sys.stderr)
    return False


def _check(options: argparse.Namespace, src: Place, chosen: Options) -> Proof:
    def check(work: Place) -> Mapping[str, Json]:
        from_format, to_format = options.command.split("-to-")
        native, foreign = (src, work) if from_format == "dcp" else (work, src)
        kind = to_format if from_format == "dcp" else from_format
        config = chosen.config if from_format == "dcp" else None
        found = prove(kind, str(foreign), str(native), keys=chosen.keys, config=config, dtype=chosen.dtype)
        against = "transformers" if kind == "hf" else "Meta's formulas"
        print(
            f"checked against {against}: logits of {len(found['layers'])} blocks differ by {found['difference']:.1e}, "
            f"{found['relative_difference']:.1e} of the largest ({found['seconds']:.1f} s and "
            f"{size_text(found['peak_bytes'])} in a process of its own)"
        )
        return {"check": {"against": against, **found}}

    return check


def _print_table(planned: Plan) -> int:
    widths = [max((len(row[i]) for row in planned.table), default=0) for i in range(2)]
    for source, result, how in planned.table:
        print(f"{source:<{widths[0]}}  {result:<{widths[1]}}  {how}")
    for problem in planned.problems:
        print(f"problem: {problem}", file=sys.stderr)
    files = listed(f"{file.name} ({size_text(file.nbytes)})" for file in planned.files)
    print(f"{planned.tensors:,} tensors, {size_text(planned.nbytes)}, in {len(planned.files):,} files: {files}")
    return 1 if planned.problems else 0


def dcp_to_torch(options: argparse.Namespace, progress: ProgressLine) -> int:
    """The command of that name."""
    converted = plain.dcp_to_torch(
        options.src,
        options.dst,
        only=options.only,
        overwrite=options.overwrite,
        verify_hashes=not options.no_verify_hashes,
        progress=progress,
    )
    return _told(options, converted)


def torch_to_dcp(options: argparse.Namespace, progress: ProgressLine) -> int:
    """The command of that name."""
    converted = plain.torch_to_dcp(
        options.src,
        options.dst,
        under=options.under,
        overwrite=options.overwrite,
        restart=options.restart,
        progress=progress,
    )
    return _told(options, converted)


def _told(options: argparse.Namespace, converted: plain.Converted) -> int:
    verified = ", the source verified by its manifest" if converted.verified else ""
    print(f"wrote {options.dst}: {converted.tensors:,} tensors, {size_text(converted.size)}{verified}")
    if converted.left_out:
        print(f"left out, for they are no tensors: {listed(converted.left_out)}")
    return 0
