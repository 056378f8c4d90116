"""Phases of a step: their order, and colors that stay the same in all parts of a page."""

from collections.abc import Iterable

COLORS = 10
"""Colors of phases in the page's palette."""

_USUAL = ("forward_backward", "optimizer", "data_wait", "checkpoint", "validation", "other")
_LIKE = {"useful": "forward_backward"}  # a part of the goodput that is drawn in a phase's color


def in_order(names: Iterable[str]) -> list[str]:
    """The usual phases first and in their usual order, then the rest by name."""
    return sorted(set(names), key=lambda name: (_USUAL.index(name) if name in _USUAL else len(_USUAL), name))


def colors(names: Iterable[str]) -> dict[str, int]:
    """Name -> color, usual phases always the same; the order is that of `names`."""
    names = list(dict.fromkeys(names))
    usual = {name: _USUAL.index(_LIKE.get(name, name)) for name in names if _LIKE.get(name, name) in _USUAL}
    free = [color for color in range(COLORS) if color not in usual.values()] or list(range(COLORS))
    free.sort(key=lambda color: color < len(_USUAL))  # those that belong to no usual phase first
    unusual = [name for name in names if name not in usual]
    own = {name: free[place % len(free)] for place, name in enumerate(unusual)}
    return {name: (usual | own)[name] for name in names}
