"""How mappings are written on the command line: `--validation.sets held texts/held.jsonl news texts/news.jsonl`.

Names and values in turn. They replace the whole mapping, whatever the configuration holds; nothing after the flag makes
it empty. A rule for `tyro`, whose own depends on the default.
"""

import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo


def registry() -> ConstructorRegistry:
    """The rule for mappings from names to text or numbers, which goes before those of tyro."""
    rules = ConstructorRegistry()
    rules.primitive_rule(_mapping_rule)
    return rules


def _mapping_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    if info.type_origin is not Mapping:
        return None
    _, kind = typing.get_args(info.type)
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[NAME {kind.__name__.upper()} ...]",
        instance_from_str=lambda words: mapping_of(words, kind),
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda mapping: [str(word) for pair in mapping.items() for word in pair] or ["none"],
    )


def mapping_of(words: Sequence[str], kind: Callable[[str], Any]) -> dict[str, Any]:
    """Makes a mapping of names and values in turn.

    Args:
        words: as they were typed.
        kind: makes a value of a word.

    Raises:
        ValueError: for a name without a value, a name given twice, or a value that is not of this kind.
    """
    if len(words) % 2:
        raise ValueError(f"names and values come in turn, and the last name, {words[-1]!r}, has no value")
    found: dict[str, Any] = {}
    for name, word in zip(words[::2], words[1::2], strict=True):
        if name in found:
            raise ValueError(f"the name {name!r} is given twice; each needs a name of its own")
        found[name] = kind(word)
    return found
