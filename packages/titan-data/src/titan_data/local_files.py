"""Finding a source's files on this machine, in an order that does not depend on the file system or the locale."""

import os
import platform
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from titan_data.errors import DataError, NotFoundError


class Found(NamedTuple):
    """Files in reading order, and a note on what was left out."""

    paths: list[Path]
    note: str = ""


def find_local(source: str, *, wanted: Callable[[str], bool], looked_for: Iterable[str]) -> Found:
    """Finds the files of a path, which may be a glob or a folder.

    Args:
        source: a file, a folder or a glob.
        wanted: which names count in a folder. A file named by itself, or found by a glob, may be called anything.
        looked_for: suffixes that are wanted, for messages.

    Raises:
        NotFoundError: if there is nothing of that name.
        DataError: if a folder has no file that counts.
    """
    place = Path(source).expanduser()
    if place.is_file():
        return Found([place.absolute()])
    if place.is_dir():
        every = _walk(place.absolute(), lambda folder: not folder.startswith("."))
        visible = [path for path in every if not path.name.startswith(".")]
        paths = [path for path in visible if wanted(path.name)]
        if not paths:
            raise DataError(
                f"the folder {source} holds {len(visible)} files, but none to read: data.format looks for "
                f"{' '.join(sorted(looked_for))}. Name other files with a glob, e.g. '{source}/**/*.log', or choose "
                "another data.format."
            )
        return Found(paths, other_files(len(visible) - len(paths)))
    here = f"(looked from the folder {Path.cwd()})"
    if any(mark in str(place) for mark in "*?["):
        pattern = place.absolute()
        matches = Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))
        paths = sorted((path for path in matches if path.is_file()), key=Path.as_posix)
        if not paths:
            raise NotFoundError(f"no file matches {source!r} {here}. Check the pattern.")
        return Found(paths)
    raise NotFoundError(
        f"there is no corpus {source!r} {here}. Name a file, a folder, a glob or a URL, 'hf:OWNER/NAME' for a "
        "dataset of the Hugging Face hub, or 'stdlib' for the source text of Python's standard library."
    )


def find_standard_library() -> Found:
    """Finds the library's own modules: no tests, nothing installed into it, nothing generated for one machine.

    Raises:
        DataError: if this Python has no source text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    every = _walk(root, lambda folder: folder not in left_out and not folder.startswith("config-"))
    modules = [path for path in every if path.suffix == ".py" and not path.name.startswith("_sysconfigdata")]
    readable = [path for path in modules if os.access(path, os.R_OK)]
    if not readable:
        raise DataError(
            f"this Python has no readable source text of its standard library in {root} (some small or frozen "
            "distributions ship none). Name a corpus of your own with data.source."
        )
    unreadable = len(modules) - len(readable)
    return Found(readable, f" ({unreadable:,} unreadable files ignored)" if unreadable else "")


def standard_library_name() -> str:
    """Returns what the corpus of the standard library is called."""
    return f"standard library of Python {platform.python_version()}"


def other_files(count: int) -> str:
    """Returns the note on files that do not count."""
    return f" ({count:,} other files ignored)" if count else ""


def _walk(root: Path, enter: Callable[[str], bool]) -> list[Path]:
    """All files under `root`, in the order of their path below it, whatever the file system or locale."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = filter(enter, folders)
        found += [path for file in files if (path := Path(folder, file)).is_file()]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())
