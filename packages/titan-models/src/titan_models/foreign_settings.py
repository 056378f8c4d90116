"""Settings out of somebody else's JSON file, of which nobody has checked the types."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any


def mistyped(
    values: Mapping[str, Any],
    *,
    whole: Collection[str] = (),
    numbers: Collection[str] = (),
    flags: Collection[str] = (),
    optional: Collection[str] = (),
) -> list[str]:
    """One sentence for each setting that is there and not of its kind.

    Args:
        values: the file's content.
        whole: names of whole numbers of at least 1.
        numbers: names of finite numbers of at least 0.
        flags: names of what is true or false.
        optional: which of them may be null, that is, not set.
    """
    kinds: list[tuple[Collection[str], Callable[[Any], bool], str]] = [
        (whole, lambda value: type(value) is int and value >= 1, "a whole number of at least 1"),
        (numbers, lambda value: type(value) in (int, float) and 0 <= value < math.inf, "a number of at least 0"),
        (flags, lambda value: type(value) is bool, "true or false"),
    ]
    return [
        f"{name} is {values[name]!r}, and {wanted} is expected"
        for names, is_one, wanted in kinds
        for name in names
        if name in values and not is_one(values[name]) and not (name in optional and values[name] is None)
    ]
