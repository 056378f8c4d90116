"""Names and shapes of one format into those of another, by a table.

A *key map* has one entry for each parameter of the native model, or for each kind of them that all blocks have:

    "layers.*.attention.wq.weight": ("model.layers.*.self_attn.q_proj.weight", "rotary"),

The first `*` of both sides is the block's number. What follows the foreign name are the differences beside the name:

    a second `*`   in the foreign name: an expert's number. The native tensor [E, ...] is the stack of those tensors
    rotary         the rows of each head are in another order there: neighbours are turned together, natively row i and
                   row i + H/2 (arXiv 2104.09864, section 3.4.2, against its rotate-half form)
    split 0        model parallelism there cuts this dimension into shards; without it every shard has the whole
    split 1
    untied         not there if the model shares it with another tensor

A name alone may stand for a tuple of one. Without a key map the names are the native ones.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from titan_ckpt.errors import CheckpointError
from titan_ckpt.formats.collection import Tensors
from titan_ckpt.formats.lazy import LazyTensor, halves_from_pairs, item, pairs_from_halves, stack

KeyMap: TypeAlias = Mapping[str, str | tuple[str, ...]]

_WORDS = ("rotary", "split 0", "split 1", "untied")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a conversion has to know about a model; it never sees the model."""

    shapes: Mapping[str, tuple[int, ...]]
    """Native name of every tensor in the state dict -> its shape, without further names of the same tensor."""

    shared: Mapping[str, str] = field(default_factory=dict)
    """Further native name -> the name in `shapes` of the tensor that it shares."""

    head_dim: int
    """Rows of one head in the projections to queries and keys."""


@dataclass(frozen=True)
class Row:
    """One line of the table for a given model: a native tensor and what it consists of in the other format."""

    native: str
    shape: tuple[int, ...]
    foreign: tuple[str, ...]
    words: tuple[str, ...]
    shares: str | None
    """The native name of the tensor of which this is a further name."""

    @property
    def stacked(self) -> bool:
        """Whether the native tensor is a stack of foreign ones."""
        return "stacked" in self.words

    @property
    def split(self) -> int | None:
        """The dimension that model parallelism cuts."""
        return next((int(word[-1]) for word in self.words if word.startswith("split")), None)

    @property
    def foreign_shape(self) -> tuple[int, ...]:
        """Of each foreign tensor."""
        return self.shape[1:] if self.stacked else self.shape


def rows(keys: KeyMap | None, facts: ModelFacts) -> list[Row]:
    """The table for a model.

    Raises:
        CheckpointError: if the key map has no line for a tensor of the model, or a word that nobody knows.
    """
    compiled = None if keys is None else [_compiled(native, entry) for native, entry in keys.items()]
    found, unknown = [], []
    names = [(name, None) for name in facts.shapes] + list(facts.shared.items())
    for native, shares in names:
        shape = facts.shapes[shares or native]
        if compiled is None:
            found.append(Row(native, shape, (native,), (), shares))
        elif row := next(_fitting(compiled, native, shape, shares), None):
            found.append(row)
        else:
            unknown.append(native)
    if unknown:
        raise CheckpointError(
            f"The other format has no place for {', '.join(unknown)}; such a model cannot be converted."
        )
    return found


def _compiled(native: str, entry: str | tuple[str, ...]) -> tuple[re.Pattern[str], str, tuple[str, ...]]:
    foreign, *words = (entry,) if isinstance(entry, str) else entry
    if strange := set(words) - set(_WORDS):
        raise CheckpointError(f"The key map's entry for {native} has unknown words: {', '.join(sorted(strange))}.")
    return re.compile(re.escape(native).replace(r"\*", r"([^.]+)")), foreign, tuple(words)


def _fitting(
    compiled: Sequence[tuple[re.Pattern[str], str, tuple[str, ...]]],
    native: str,
    shape: tuple[int, ...],
    shares: str | None,
) -> Iterator[Row]:
    for pattern, foreign, words in compiled:
        if match := pattern.fullmatch(native):
            for group in match.groups():
                foreign = foreign.replace("*", group, 1)
            if "*" in foreign:
                experts = tuple(foreign.replace("*", str(i)) for i in range(shape[0]))
                yield Row(native, shape, experts, (*words, "stacked"), shares)
            else:
                yield Row(native, shape, (foreign,), words, shares)


@dataclass(frozen=True, kw_only=True)
class Mapped:
    """Tensors under other names, and why they may not be used."""

    tensors: Tensors
    rows: Sequence[Row]
    problems: tuple[str, ...]
    """Each names the key and its file."""


def to_native(
    tensors: Tensors, keys: KeyMap | None, facts: ModelFacts, derived: Sequence[str] = (), where: str = "the source"
) -> Mapped:
    """The native tensors of a model out of those of another format.

    Args:
        tensors: under the foreign names.
        keys: the key map; None if the names are the native ones.
        facts: of the model that is expected.
        derived: patterns of foreign names that follow from the configuration (frequencies, masks) and are passed over.
        where: what `tensors` are called in problems.
    """
    table = rows(keys, facts)
    problems: list[str] = []
    found: dict[str, LazyTensor] = {}
    for row in table:
        there = [tensors[name] for name in row.foreign if name in tensors]
        if len(there) < len(row.foreign):
            if row.shares is None:
                missing = (name for name in row.foreign if name not in tensors)
                problems += [f"{name} is missing in {where} (it makes {row.native})" for name in missing]
            continue
        wrong = [_mismatch(name, tensor, row) for name, tensor in zip(row.foreign, there, strict=True)]
        problems += [problem for problem in wrong if problem]
        if any(wrong):
            continue
        tensor = stack(there) if row.stacked else there[0]
        found[row.native] = halves_from_pairs(tensor, facts.head_dim) if "rotary" in row.words else tensor
    known = {name for row in table for name in row.foreign}
    passed_over = [re.compile(re.escape(pattern).replace(r"\*", r"[^.]+")) for pattern in derived]
    problems += [
        f"{name} in {_in_files(tensor)} is not known to this model"
        for name, tensor in tensors.items()
        if name not in known and not any(pattern.fullmatch(name) for pattern in passed_over)
    ]
    problems += _untied(found, facts)
    kept = {name: found[name] for name in facts.shapes if name in found}
    return Mapped(tensors=kept, rows=table, problems=tuple(problems))


def to_foreign(native: Tensors, keys: KeyMap | None, facts: ModelFacts) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of another format out of the native ones, and further names of the same tensors.

    A native tensor that is not given (because it was missing) gives none.
    """
    found: dict[str, LazyTensor] = {}
    shared: dict[str, str] = {}
    table = rows(keys, facts)
    by_native = {row.native: row for row in table}
    for row in table:
        if row.shares is not None:
            if "untied" not in row.words:
                shared |= zip(row.foreign, by_native[row.shares].foreign, strict=True)
            continue
        if row.native not in native:
            continue
        tensor = native[row.native]
        if "rotary" in row.words:
            tensor = pairs_from_halves(tensor, facts.head_dim)
        found |= {name: item(tensor, i) if row.stacked else tensor for i, name in enumerate(row.foreign)}
    return found, {name: other for name, other in shared.items() if other in found}


def _mismatch(name: str, tensor: LazyTensor, row: Row) -> str | None:
    if tensor.shape != row.foreign_shape:
        return f"{name} in {_in_files(tensor)} is {list(tensor.shape)}, and {list(row.foreign_shape)} is expected"
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        return f"{name} in {_in_files(tensor)} is of {tensor.dtype}: quantized weights cannot be converted"
    return None


def _untied(found: dict[str, LazyTensor], facts: ModelFacts) -> list[str]:
    """Tensors that the model shares and the source has twice, with other numbers."""
    problems = []
    for name, other in facts.shared.items():
        if name in found and other not in found:
            found[other] = found[name]
        elif name in found and not same(found[name], found[other]):
            problems.append(
                f"{name} in {_in_files(found[name])} has other numbers than {other}, but the configuration ties them"
            )
    return problems


def same(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two tensors have the same numbers; reads both."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return all(torch.equal(one.read(*piece), other.read(*piece)) for piece in one.pieces())


def _in_files(tensor: LazyTensor) -> str:
    return ", ".join(tensor.files)
