"""Files behind URLs: fetched once into the cache through fsspec, hashed on the way, and kept under their hash.

So a remote file has the same kind of fingerprint as a local one, of all its bytes, and everything else in this package
reads local files. What the store says of a file (size, and ETag or time of change) only decides whether it has to be
fetched again to be hashed: an ETag alone is no identity, since it depends on how a file was uploaded. A store that
says neither makes every start fetch anew. The copies may be deleted at any time; one that is needed is fetched again,
and refused if it is no longer the same.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from titan_data.cache import Progress, exclusive, writing_to
from titan_data.errors import DataError, MissingPackageError, NotFoundError

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
# What stores call the things that change with a file, the more telling first.
_MARKERS = (
    "ETag", "etag", "checksum", "blob_id", "md5Hash", "content_md5", "crc32c",
    "LastModified", "last_modified", "updated", "mtime", "created",
)  # fmt: skip
_BLOCK_BYTES = 1 << 23
_AT_ONCE = 4


class RemoteFile(NamedTuple):
    """What a store says of a file."""

    url: str
    size_bytes: int | None
    marker: str | None
    """Changes when the file does; None if the store tells nothing that would."""


@dataclass(frozen=True)
class RemoteContent:
    """A remote file, as it was when it was hashed; the `Content` of a `SourceFile`."""

    url: str
    size_bytes: int
    sha256: str
    folder: Path

    def local(self) -> Path:
        """Returns the copy, fetching it first if it is gone.

        Raises:
            DataError: if it cannot be fetched, or is no longer the file that was hashed.
        """
        copy = self.folder / self.sha256
        if not copy.exists() and _fetch(self.url, self.folder).sha256 != self.sha256:
            raise DataError(f"{self.url} has changed since it was fingerprinted. Start again to read the new content.")
        return copy

    def check_unchanged(self) -> None:
        """The copy is this package's own, and cannot change."""


def is_url(source: str) -> bool:
    """Returns whether a source is a URL rather than a path."""
    return "://" in source


def find_remote(source: str, *, wanted: Callable[[str], bool]) -> tuple[list[RemoteFile], int]:
    """Finds the files of a URL, which may be a glob or a folder.

    Args:
        source: e.g. "s3://bucket/folder/*.jsonl.gz".
        wanted: which names count in a folder.

    Returns:
        The files in the order of their paths, and how many others of a folder do not count.

    Raises:
        NotFoundError: if there is none.
        DataError: if the store refuses, or its package is missing.
    """
    with _store_errors(source):
        fs, path = _filesystem(source)
        is_glob = any(mark in path for mark in ("*[" if source.startswith("http") else "*?["))
        if is_glob:
            found = fs.glob(path, detail=True)
        elif fs.isfile(path):
            found = {path: fs.info(path)}
        else:
            found = fs.find(path, detail=True)
        files = {name: info for name, info in found.items() if info["type"] == "file"}
        if not files:
            if not is_glob:
                fs.info(path)  # raises the reason, where a search only finds nothing
            raise NotFoundError(f"there is no corpus {source!r}: no file matches. Check the name, and the credentials.")
        named = is_glob or path in files
        counted = files if named else {name for name in files if wanted(name.removeprefix(path))}
        remote = [_described(fs.unstrip_protocol(name), files[name]) for name in sorted(counted)]
    return remote, len(files) - len(counted)


def remote_contents(
    files: Sequence[RemoteFile], memory: Path, folder: Path, *, progress: Progress
) -> list[RemoteContent]:
    """Returns the content of each file, fetching those that are new or have changed.

    Args:
        files: as the store described them just now.
        memory: the JSON file that keeps hashes from one start to the next.
        folder: where copies are kept.
        progress: is told when there is something to fetch.

    Raises:
        DataError: for a file that cannot be fetched, or a cache that cannot be written.
    """
    known = _load(memory)
    if any(_unknown(file, known) for file in files):
        with writing_to(memory), exclusive(memory, what="copies of remote files", progress=progress):
            known = _load(memory)  # another process may just have done it
            new = [file for file in files if _unknown(file, known)]
            if new:
                size = sum(file.size_bytes or 0 for file in new)
                progress(f"fetching {len(new)} new or changed remote files ({size / 1e6:,.1f} MB)")
                with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
                    fetched = pool.map(lambda file: _fetch(file.url, folder), new)
                    for file, content in zip(new, fetched, strict=True):
                        if file.size_bytes not in (None, content.size_bytes):
                            raise DataError(
                                f"{file.url} was cut short: {content.size_bytes:,} of {file.size_bytes:,} bytes. "
                                "Start again to fetch it anew."
                            )
                        entry = {"fetched_bytes": content.size_bytes, "sha256": content.sha256}
                        known[file.url] = file._asdict() | entry
                _save(memory, {file.url: known[file.url] for file in files})
    return [
        RemoteContent(file.url, known[file.url]["fetched_bytes"], known[file.url]["sha256"], folder) for file in files
    ]


def _described(url: str, info: Mapping[str, Any]) -> RemoteFile:
    marker = next((f"{key} {info[key]}" for key in _MARKERS if info.get(key) is not None), None)
    return RemoteFile(url, info.get("size"), marker)


def _unknown(file: RemoteFile, known: Mapping[str, Mapping[str, Any]]) -> bool:
    entry = known.get(file.url)
    return entry is None or file.marker is None or (entry["size_bytes"], entry["marker"]) != file[1:]


def _fetch(url: str, folder: Path) -> RemoteContent:
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.{os.getpid()}.partial"
    digest, size = hashlib.sha256(), 0
    try:
        with _store_errors(url):
            fs, path = _filesystem(url)
            with fs.open(path, "rb", block_size=_BLOCK_BYTES) as remote, scratch.open("wb") as copy:
                while block := remote.read(_BLOCK_BYTES):
                    digest.update(block)
                    size += len(block)
                    with writing_to(folder):
                        copy.write(block)
        scratch.replace(folder / digest.hexdigest())
    finally:
        scratch.unlink(missing_ok=True)
    return RemoteContent(url, size, digest.hexdigest(), folder)


def _filesystem(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs  # a tenth of a second, for those who need it

    return url_to_fs(url)


@contextlib.contextmanager
def _store_errors(url: str) -> Generator[None]:
    """Turns whatever a provider raises into an error that names the URL."""
    protocol = url.partition("://")[0]
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        remedy = f"pip install 'titan-data[{_EXTRAS[protocol]}]'" if protocol in _EXTRAS else "the package it names"
        raise MissingPackageError(
            f"reading {url} takes a package that cannot be imported ({error}). Install {remedy}."
        ) from error
    except Exception as error:  # providers have no common class of errors
        reason: BaseException = error
        if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, OSError):
            reason = error.__cause__  # HTTP's provider calls a host that it cannot reach a missing file
        if isinstance(reason, FileNotFoundError):
            raise NotFoundError(f"{url} does not exist ({error}). Check the name, and the credentials.") from error
        raise DataError(
            f"cannot read {url}: {type(reason).__name__}: {reason}. Check the name, the network and the credentials."
        ) from error


def _load(memory: Path) -> dict[str, dict[str, Any]]:
    # Whatever is wrong with it, it is only a memory: the files are still there to be fetched.
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        keys = {*RemoteFile._fields, "fetched_bytes", "sha256"}
        return {url: entry for url, entry in json.loads(memory.read_bytes()).items() if set(entry) == keys}
    return {}


def _save(memory: Path, known: Mapping[str, Mapping[str, Any]]) -> None:
    scratch = memory.with_name(f"{memory.name}.partial")
    scratch.write_text(json.dumps(known))
    scratch.replace(memory)
