"""`diff`: two models, their configurations and their tensors, whatever formats they are in.

Sides of one format are compared by the names that it has, others (and DCP folders, if `--keys` says whose names they
have) by native names.
"""

import argparse
import contextlib
import sys
from dataclasses import dataclass
from functools import cached_property

from titan_ckpt.conversion.compare import differences
from titan_ckpt.conversion.plan import Counter
from titan_ckpt.conversion.survey import Format, detect, read_any
from titan_ckpt.errors import CheckpointError
from titan_ckpt.formats.collection import Tensors, listed
from titan_ckpt.location import place_of
from titan_ckpt.place import Place
from titan_convert import models
from titan_convert.convert import Options, Source, read
from titan_convert.models import Model
from titan_convert.progress import ProgressLine
from titan_convert.show import READERS, meta_splits, model_of


@dataclass(frozen=True)
class _Side:
    """One of the two, and how it is to be read."""

    place: Place
    kind: Format
    config: str | None
    keys: str

    @property
    def reader(self) -> str:
        """The name of the format in commands; that of a file is its own."""
        return READERS.get(self.kind, self.kind)

    @property
    def options(self) -> Options:
        """With the configuration that the user names only where the folder has none: else `diff` shows both."""
        return Options(keys=self.keys, config=None if models.says_its_model(self.place) else self.config)

    @cached_property
    def model(self) -> Model | None:
        """The configuration, if it can be known."""
        if self.kind in READERS:
            with contextlib.suppress(CheckpointError):
                return model_of(self.place, self.kind, self.options.config)
        return None


def diff(options: argparse.Namespace, progress: ProgressLine) -> int:
    """Every difference; 0 if there is none."""
    places = [place_of(options.one), place_of(options.other)]
    one, other = (_Side(place, detect(place), options.config, options.keys) for place in places)
    as_they_are = one.reader == other.reader and not (one.reader == "dcp" and options.keys != "titan")
    unlike = _compare_configurations(one, other)
    ours, theirs = (_tensors(side, as_they_are) for side in (one, other))
    found = 0
    with Counter(progress, "comparing", sum(tensor.nbytes for tensor in ours.values())) as count:
        for difference in differences(ours, theirs, count):
            found += 1
            largest = "" if difference.largest is None else f", the largest difference is {difference.largest:.6g}"
            print(f"{difference.name}: {difference.what}: {difference.detail}{largest}")
    print(f"{found:,} of {len({*ours, *theirs}):,} tensors differ" if found else f"equal: {len(ours):,} tensors")
    if unlike:
        print(f"the configurations differ in {unlike} fields")
    if not ours.keys() & theirs.keys():
        print(f"not one name is on both sides: {_hint(one, other)}", file=sys.stderr)
    return 1 if found or unlike else 0


def _compare_configurations(one: _Side, other: _Side) -> int:
    """Prints the fields that differ and returns how many there are."""
    if one.model is None or other.model is None:
        if one.kind in READERS and other.kind in READERS:
            silent = " and ".join(str(side.place) for side in (one, other) if side.model is None)
            print(f"configurations not compared: none can be read in {silent}", file=sys.stderr)
        return 0
    found = one.model.differences(other.model)
    for difference in found:
        print(f"configuration: {difference}")
    return len(found)


def _tensors(side: _Side, as_they_are: bool) -> Tensors:
    if as_they_are or side.kind not in READERS:
        collection = read_any(side.place, meta_splits(side.model))
        problems, tensors = collection.problems, collection.tensors
    else:
        source = _read(side)
        problems, tensors = source.native.problems, source.native.mapped.tensors
    if problems:
        raise CheckpointError(f"{side.place} cannot be compared: {listed(problems, separator='; ')}.")
    return tensors


def _read(side: _Side) -> Source:
    """By native names; a DCP folder that has them already may stand beside one for which `--keys` is meant."""
    source = read(side.reader, side.place, side.options)
    if side.reader == "dcp" and side.keys != "titan" and source.native.problems:
        native = read(side.reader, side.place, Options(config=side.options.config))
        return source if native.native.problems else native
    return source


def _hint(one: _Side, other: _Side) -> str:
    if "dcp" in (one.reader, other.reader):
        return (
            "if a DCP side has the names of another project, say whose with --keys; of a torch.save file made by "
            "`dcp-to-torch` without `--only model`, names begin with `model.`"
        )
    return "they are files of other programs, or of other models"
