"""Which source a name means: files of documents, in a fixed order, with a fingerprint of their content."""

import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

from titan_data.cache import Progress
from titan_data.columnar import arrow_parts, parquet_parts
from titan_data.config import DataConfig, Format
from titan_data.errors import DataError
from titan_data.fingerprint import LocalContent, hash_files
from titan_data.hugging_face_datasets import PREFIX, hub_dataset, saved_dataset
from titan_data.jsonl import jsonl_parts
from titan_data.local_files import Found, find_local, find_standard_library, other_files, standard_library_name
from titan_data.manifest import is_token_folder
from titan_data.python_source import is_python_name, python_source
from titan_data.records import TextOf, text_of
from titan_data.remote import find_remote, is_url, remote_contents
from titan_data.source import Part, Source
from titan_data.source_file import COMPRESSIONS, SourceFile, compression, kind
from titan_data.text_files import TextFile

STANDARD_LIBRARY = "stdlib"

FileFormat = Literal["text", "jsonl", "parquet", "arrow"]


class Named(NamedTuple):
    """A source that has a short name."""

    source: str
    format: Format


NAMED = {
    "conversations": Named(str(resources.files("titan_data") / "assets" / "conversations.jsonl"), "jsonl"),
    "c4": Named("hf://datasets/allenai/c4/en/c4-train.*.json.gz", "jsonl"),
    "c4_test": Named("tests/assets/c4_test", "jsonl"),
}

# What a folder's files may be called. A file named by itself, or found by a glob, may be called anything.
_SUFFIXES: dict[FileFormat, set[str]] = {
    "jsonl": {".jsonl", ".ndjson"},
    "parquet": {".parquet"},
    "arrow": {".arrow", ".feather", ".ipc"},
    "text": {
        ".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex", ".adoc", ".html", ".htm", ".xml", ".css",
        ".csv", ".tsv", ".toml", ".yaml", ".yml", ".ini", ".cfg", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx",
        ".hpp", ".cu", ".cuh", ".m", ".swift", ".java", ".kt", ".scala", ".go", ".rs", ".rb", ".pl", ".php", ".lua",
        ".r", ".jl", ".js", ".jsx", ".ts", ".tsx", ".cs", ".hs", ".ml", ".ex", ".erl", ".clj", ".lisp", ".el",
        ".sh", ".bash", ".zsh", ".sql",
    },
}  # fmt: skip
# One JSON value or one a line: only who knows can say.
_JSON = ".json"


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """Documents in files; a `Source`.

    The fingerprint is made of the files' contents in reading order. Names are no part of it, so a moved or renamed
    corpus stays itself; renaming files so that their order changes does change it, as it changes the text.
    """

    name: str
    files: tuple[SourceFile, ...]
    formats: tuple[FileFormat, ...]
    text: TextOf
    skip_undecodable: bool = False
    note: str = ""

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the documents in order."""
        digest = hashlib.sha256()
        for file, format in zip(self.files, self.formats, strict=True):
            reading = "text" if format == "text" else f"{format} {self.text.identity}"
            digest.update(f"{file.content.sha256} {file.compression}{reading}\n".encode())
        return digest.hexdigest()

    @functools.cached_property
    def parts(self) -> Sequence[Part]:
        """The documents in parts; opens tables, to see how they are cut.

        Raises:
            DataError: for a table that is not whole.
        """
        parts: list[Part] = []
        for file, format in zip(self.files, self.formats, strict=True):
            match format:
                case "text":
                    parts.append(TextFile(file, self.skip_undecodable))
                case "jsonl":
                    parts += jsonl_parts(file, self.text)
                case "parquet":
                    parts += parquet_parts(file, self.text)
                case "arrow":
                    parts += arrow_parts(file, self.text)
        return parts

    def describe(self) -> str:
        """Returns one line about it."""
        sizes = [file.content.size_bytes for file in self.files]
        empty = f" ({sizes.count(0):,} of them empty)" if 0 in sizes else ""
        return f"{self.name}: {len(sizes):,} files{empty}, {sum(sizes) / 1e6:,.1f} MB{self.note}"


def open_source(config: DataConfig, *, cache: Path, progress: Progress) -> Source:
    """Finds the files behind a source's name and fingerprints them, or calls what makes a source of another kind.

    Args:
        config: `source`, `format`, `text_field` and `template` say what to read.
        cache: the folder that remembers files' hashes, and keeps copies of remote files.
        progress: is told what takes time.

    Raises:
        NotFoundError: if there is nothing of that name.
        DataError: if there is no file to read, or an option cannot take effect.
    """
    if config.format not in ("auto", *_SUFFIXES):
        raise DataError(
            f"data.format is {config.format!r}; it must be 'auto' or one of {', '.join(map(repr, _SUFFIXES))}."
        )
    if config.template is not None and config.text_field != DataConfig.text_field:
        raise DataError("data.text_field and data.template are two ways to say where the text is. Set one of them.")
    if is_token_folder(Path(config.source).expanduser()):
        raise DataError(
            f"{config.source} is tokenized already, and what is wanted here is text. Token folders are read with "
            "data.kind text and mixture, as they are; for anything else, name the text that they were made of."
        )
    text = text_of(config.text_field, config.template)
    if not config.source.startswith(PREFIX) and is_python_name(config.source):
        if config.format != "auto" or config.template or config.text_field != DataConfig.text_field:
            raise DataError(
                f"data.format, data.text_field and data.template are for files, and {config.source} reads what it "
                "likes. Leave them out."
            )
        return python_source(config.source)
    if config.source in NAMED:
        if config.format not in ("auto", NAMED[config.source].format):
            raise DataError(f"data.format is {config.format!r}, but {config.source} is {NAMED[config.source].format}.")
        source, format = NAMED[config.source]
    else:
        source, format = config.source, config.format

    found = _find(source, format, cache, progress)
    if (config.template or config.text_field != DataConfig.text_field) and set(found.formats) == {"text"}:
        option = "data.text_field" if config.template is None else "data.template"
        raise DataError(f"{option} is set, but {config.source} has only text files, which have no fields.")
    standard = source == STANDARD_LIBRARY
    return FileSource(
        name=standard_library_name() if standard else config.source,
        files=found.files,
        formats=found.formats,
        text=text,
        skip_undecodable=standard,
        note=found.note,
    )


class _Found(NamedTuple):
    files: tuple[SourceFile, ...]
    formats: tuple[FileFormat, ...]
    note: str = ""


def _find(source: str, format: Format, cache: Path, progress: Progress) -> _Found:
    key = hashlib.sha256(os.fsencode(f"{_anchored(source)} {format}")).hexdigest()[:16]
    memory = cache / "files" / f"{key}.json"
    if is_url(source):
        remote, others = find_remote(source, wanted=functools.partial(_counts, format=format))
        formats = tuple(_format(file.url, format) for file in remote)
        contents = remote_contents(remote, memory, cache / "remote", progress=progress)
        return _Found(tuple(SourceFile(c.url, c) for c in contents), formats, other_files(others))
    (paths, note), formats = _local_files(source, format, progress)
    hashes = hash_files(paths, memory, progress=progress)
    files = tuple(SourceFile(str(path), LocalContent(path, hash)) for path, hash in zip(paths, hashes, strict=True))
    return _Found(files, formats, note)


def _local_files(source: str, format: Format, progress: Progress) -> tuple[Found, tuple[FileFormat, ...]]:
    tables = hub_dataset(source, progress=progress) if source.startswith(PREFIX) else saved_dataset(Path(source))
    if source == STANDARD_LIBRARY:
        only, what, found = "text", "the standard library is text", find_standard_library()
    elif tables is not None:
        only, what, found = "arrow", f"{source} is a dataset of Arrow tables", Found(tables)
    else:
        counts = functools.partial(_counts, format=format)
        found = find_local(source, wanted=counts, looked_for=_looked_for(format))
        return found, tuple(_format(str(path), format) for path in found.paths)
    if format not in ("auto", only):
        raise DataError(f"data.format is {format!r}, but {what}. Leave it at 'auto'.")
    return found, (only,) * len(found.paths)


def _counts(name: str, *, format: Format) -> bool:
    """Whether a folder's file of this name is one to read."""
    hidden = any(folder.startswith(".") for folder in name.split("/"))
    return not hidden and kind(name) in _looked_for(format)


def _anchored(source: str) -> str:
    """The name, independent of the folder from which it is looked at."""
    special = is_url(source) or source.startswith(PREFIX) or source == STANDARD_LIBRARY
    return source if special else str(Path(source).expanduser().absolute())


def _looked_for(format: Format) -> set[str]:
    if format == "auto":
        return set().union(*_SUFFIXES.values())
    return _SUFFIXES[format] | ({_JSON} if format == "jsonl" else set())


def _format(name: str, format: Format) -> FileFormat:
    chosen = _by_suffix(name) if format == "auto" else format
    if compression(name) and chosen in ("parquet", "arrow"):
        raise DataError(f"{name}: {chosen} files are compressed inside; unpack it to a file without {COMPRESSIONS}.")
    return chosen


def _by_suffix(name: str) -> FileFormat:
    suffix = kind(name)
    if suffix == _JSON:
        raise DataError(
            f"{name}: a .json file may be one JSON value or one a line. Set data.format to 'jsonl' if each line is an "
            "object, or to 'text' to train on the JSON itself."
        )
    return next((format for format, suffixes in _SUFFIXES.items() if suffix in suffixes), "text")
