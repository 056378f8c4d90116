"""Sources from outside this package: `my_sources:Poems` is what the name `Poems` in the module `my_sources` makes."""

import importlib
import re
from pathlib import Path

from titan_data.errors import DataError, NotFoundError
from titan_data.source import Source

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_MEMBERS = ("fingerprint", "parts", "describe")


def is_python_name(source: str) -> bool:
    """Whether a source is named as module and function or class, and not as a file."""
    return bool(_NAME.fullmatch(source)) and not Path(source).exists()


def python_source(source: str) -> Source:
    """Calls what a name stands for, without arguments, and returns the `Source` that comes of it.

    Raises:
        NotFoundError: if there is no such module, or nothing of that name in it.
        DataError: if it fails, or makes something else.
    """
    module_name, _, name = source.partition(":")
    try:
        make = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise NotFoundError(
            f"the source {source!r} cannot be imported ({error}). It is read as MODULE:NAME, since there is no such "
            "file: install the module, or add its folder to PYTHONPATH."
        ) from error
    try:
        made = make()
    except Exception as error:  # it is a program of the user's
        raise DataError(
            f"the source {source!r} failed when it was called ({type(error).__name__}: {error})."
        ) from error
    if missing := [member for member in _MEMBERS if not hasattr(made, member)]:
        raise DataError(
            f"the source {source!r} makes a {type(made).__name__}, which is no source: it has no "
            f"{', '.join(missing)}. `titan_data.source.Source` says what a source has."
        )
    return made
