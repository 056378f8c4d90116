"""Text for a terminal: lines of its width, and sizes that a person can read. Imports no torch."""

import math
import shutil
import textwrap


def terminal_width() -> int:
    """Characters in a line: those of the terminal, at most 200; 120 without one, unless COLUMNS says otherwise."""
    return min(shutil.get_terminal_size((120, 24)).columns, 200)


def wrap(line: str, width: int) -> str:
    """`line` in lines of `width` characters, the further ones indented by four more; a longer word stays whole."""
    if len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def human(size: float) -> str:
    """A number of bytes for a person: 1,536 -> `1.50 KiB`."""
    if size < 1024:
        return f"{size:.0f} B"
    power = min(int(math.log2(size) // 10), 5)
    return f"{size / 1024**power:.2f} {'KMGTP'[power - 1]}iB"
