"""Where documents come from: the files behind a name, in a fixed order, with a fingerprint of their content.

`Corpus` is all that the rest of the package knows of a source. Another kind of source is a class with its four
members and a line in `open_corpus`.
"""

import functools
import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from titan_data.cache import Progress
from titan_data.config import DataConfig
from titan_data.errors import DataError, NotFoundError
from titan_data.fingerprint import FileHash, hash_files
from titan_data.reading import Piece, ReadCounts, is_utf8, read_jsonl, read_text

STANDARD_LIBRARY = "stdlib"

Format = Literal["text", "jsonl"]

_JSONL_SUFFIXES = {".jsonl", ".ndjson"}
# What a folder's text files may be called. A file named by itself, or found by a glob, may be called anything.
_TEXT_SUFFIXES = {
    ".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex", ".adoc", ".html", ".htm", ".xml", ".css", ".csv",
    ".tsv", ".toml", ".yaml", ".yml", ".ini", ".cfg", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu",
    ".cuh", ".m", ".swift", ".java", ".kt", ".scala", ".go", ".rs", ".rb", ".pl", ".php", ".lua", ".r", ".jl", ".js",
    ".jsx", ".ts", ".tsx", ".cs", ".hs", ".ml", ".ex", ".erl", ".clj", ".lisp", ".el", ".sh", ".bash", ".zsh", ".sql",
}  # fmt: skip


class Corpus(Protocol):
    """An ordered collection of documents."""

    @property
    def fingerprint(self) -> str:
        """A hash of the documents in order: equal if and only if the text is."""
        ...

    @property
    def size_bytes(self) -> int:
        """How much there is to read."""
        ...

    def pieces(self, counts: ReadCounts) -> Iterator[Piece]:
        """Yields all documents, in pieces of bounded size, while keeping `counts`."""
        ...

    def describe(self) -> str:
        """Returns one line about it."""
        ...


@dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus, as it was when it was hashed."""

    path: Path
    format: Format
    content: FileHash


@dataclass(frozen=True, kw_only=True)
class FileCorpus:
    """Documents in text and JSONL files.

    The fingerprint is made of the files' contents in reading order. Names are no part of it, so a moved or renamed
    corpus stays itself; renaming files so that their order changes does change it, as it changes the text.
    """

    name: str
    files: tuple[CorpusFile, ...]
    text_field: str
    skip_undecodable: bool = False
    """Leave out files that are not UTF-8, and count them, instead of refusing them."""
    note: str = ""

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the documents in order."""
        digest = hashlib.sha256()
        for file in self.files:
            reading = f"jsonl field {self.text_field!r}" if file.format == "jsonl" else "text"
            digest.update(f"{file.content.sha256} {reading}\n".encode())
        return digest.hexdigest()

    @property
    def size_bytes(self) -> int:
        """The size of all files."""
        return sum(file.content.size_bytes for file in self.files)

    def pieces(self, counts: ReadCounts) -> Iterator[Piece]:
        """Yields all documents.

        Raises:
            DataError: for a file that is malformed, or has changed since its content was hashed.
        """
        for file in self.files:
            if self.skip_undecodable and not is_utf8(file.path):
                counts.skipped_files += 1
                continue
            if file.format == "jsonl":
                yield from read_jsonl(file.path, self.text_field, counts)
            else:
                yield from read_text(file.path, counts)
            if not file.content.still_describes(file.path):
                raise DataError(
                    f"{file.path} changed while it was being read. Start again when nothing writes to the corpus."
                )

    def describe(self) -> str:
        """Returns one line about it."""
        return f"{self.name}: {len(self.files):,} files, {self.size_bytes / 1e6:,.1f} MB{self.note}"


def open_corpus(source: str, *, format: str, text_field: str, memory: Path, progress: Progress) -> FileCorpus:
    """Finds the files behind a source's name and fingerprints them.

    Args:
        source: "stdlib", or the path of a file or folder, or a glob.
        format: "text", "jsonl", or "auto" to tell by each file's suffix.
        text_field: the field of a JSONL line that holds the text.
        memory: the folder that remembers files' hashes.
        progress: is told what takes time.

    Raises:
        NotFoundError: if there is nothing of that name.
        DataError: if there is no file to read, or an option cannot take effect.
    """
    if format not in ("auto", "text", "jsonl"):
        raise DataError(f"data.format is {format!r}; it must be 'auto', 'text' or 'jsonl'.")
    standard = source == STANDARD_LIBRARY
    if standard and format == "jsonl":
        raise DataError("data.format is 'jsonl', but the standard library is text. Leave it at 'auto'.")
    place = Path(sysconfig.get_path("stdlib") if standard else source).expanduser()
    paths, note = _standard_library(place) if standard else _user_files(place, format)

    formats = [_format(path, format) for path in paths]
    if text_field != DataConfig.text_field and "jsonl" not in formats:
        raise DataError(f"data.text_field is {text_field!r}, but {source} has no JSONL file that could have fields.")
    key = hashlib.sha256(os.fsencode(f"{place.absolute()} {format}")).hexdigest()[:16]
    hashes = hash_files(paths, memory / f"{key}.json", progress=progress)
    return FileCorpus(
        name=f"standard library of Python {platform.python_version()}" if standard else source,
        files=tuple(map(CorpusFile, paths, formats, hashes)),
        text_field=text_field,
        skip_undecodable=standard,
        note=note,
    )


def _format(path: Path, format: str) -> Format:
    if format == "text" or format == "jsonl":
        return format
    if path.suffix.lower() == ".json":
        raise DataError(
            f"{path}: a .json file may be one JSON value or one a line. Set data.format to 'jsonl' if each line is an "
            "object, or to 'text' to train on the JSON itself."
        )
    return "jsonl" if path.suffix.lower() in _JSONL_SUFFIXES else "text"


def _user_files(source: Path, format: str) -> tuple[list[Path], str]:
    """The files of a file, folder or glob in reading order, and a note on what is left out."""
    if source.is_file():
        return [source.absolute()], ""
    if source.is_dir():
        suffixes = {"text": _TEXT_SUFFIXES, "jsonl": _JSONL_SUFFIXES}.get(format, _TEXT_SUFFIXES | _JSONL_SUFFIXES)
        every = _walk(source.absolute(), lambda folder: not folder.startswith("."))
        visible = [path for path in every if not path.name.startswith(".")]
        paths = [path for path in visible if path.suffix.lower() in suffixes]
        if not paths:
            raise DataError(
                f"the folder {source} holds {len(visible)} files, but none to read: data.format {format!r} looks for "
                f"{' '.join(sorted(suffixes))}. Name other files with a glob, e.g. '{source}/**/*.log'."
            )
        ignored = len(visible) - len(paths)
        return paths, f" ({ignored:,} other files ignored)" if ignored else ""
    here = f"(looked from the folder {Path.cwd()})"
    if any(mark in str(source) for mark in "*?["):
        pattern = source.absolute()
        matches = Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))
        paths = sorted((path for path in matches if path.is_file()), key=Path.as_posix)
        if not paths:
            raise NotFoundError(f"no file matches data.source {str(source)!r} {here}")
        return paths, ""
    raise NotFoundError(
        f"data.source {str(source)!r} does not exist {here}. Name a file, a folder or a glob, or {STANDARD_LIBRARY!r} "
        "for the source text of Python's standard library."
    )


def _standard_library(root: Path) -> tuple[list[Path], str]:
    """The library's own modules: no tests, nothing installed into it, nothing generated for one machine."""
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
    return readable, f" ({unreadable:,} unreadable files ignored)" if unreadable else ""


def _walk(root: Path, enter: Callable[[str], bool]) -> list[Path]:
    """All files under `root`, in the order of their path below it, whatever the file system or locale."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = filter(enter, folders)
        found += [path for file in files if (path := Path(folder, file)).is_file()]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())
