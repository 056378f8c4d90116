"""What a folder of tokens holds, written last: `manifest.json` is there if and only if the rest is whole.

    manifest.json             this
    documents.bin             int64 [D + 1]: the first token of each document, then N
    shard-00000.tokens.bin    token ids in a row, uint16 if the vocabulary allows it, else uint32
    shard-00001.tokens.bin    the tokens that follow, and so on; a document lies in one shard
    tokenizer/                the files of the tokenizer

All little-endian, as is every machine that torch runs on. Each document ends with the end-of-text token; one that has
no tokens is left out.
"""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_data.cache import DamagedError
from titan_data.errors import DataError

FORMAT = 2
MANIFEST, DOCUMENTS, TOKENIZER = "manifest.json", "documents.bin", "tokenizer"
PLAN = "plan.json"
"""What is being built; gone when the manifest is there."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file of the folder."""

    name: str
    """Relative to the folder, with slashes."""
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """A stretch of the token stream."""

    file: FileRecord
    tokens: int
    documents: int
    empty_documents: int
    skipped_files: int


@dataclass(frozen=True, kw_only=True)
class TokenizerRecord:
    """The tokenizer that made the tokens, and what can be known of it without loading it."""

    name: str
    hash: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int | None
    engine: str
    """What it ran on; the tokens do not depend on it."""
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that `manifest.json` says."""

    format: int
    fingerprint: str
    """Of the stream of tokens: equal if the documents, their order and the tokenizer are."""
    source: str
    """Where the documents came from, in words."""
    tokenizer: TokenizerRecord
    token_type: str
    documents_file: FileRecord
    shards: tuple[ShardRecord, ...]

    @property
    def tokens(self) -> int:
        """How many tokens all shards hold."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """How many documents all shards hold, not counting empty ones."""
        return sum(shard.documents for shard in self.shards)

    @property
    def empty_documents(self) -> int:
        """How many documents were left out because they have no tokens."""
        return sum(shard.empty_documents for shard in self.shards)

    @property
    def skipped_files(self) -> int:
        """How many files were left out because they are not UTF-8."""
        return sum(shard.skipped_files for shard in self.shards)

    @property
    def files(self) -> list[FileRecord]:
        """All files of the folder but the manifest."""
        return [*(shard.file for shard in self.shards), self.documents_file, *self.tokenizer.files]


def is_token_folder(folder: Path) -> bool:
    """Returns whether this is a folder of tokens, which may be damaged.

    Raises:
        DataError: if it is one that has not been finished.
    """
    if (folder / PLAN).is_file() and not (folder / MANIFEST).is_file():
        raise DataError(f"the tokens in {folder} are not finished. Run the same titan-tokenize again: it goes on.")
    return (folder / MANIFEST).is_file() and any(folder.glob("shard-*.tokens.bin"))


def read_manifest(folder: Path) -> Manifest:
    """Reads a folder's manifest and compares the sizes of all files with it.

    Raises:
        FileNotFoundError: if the folder is not there.
        DamagedError: if a file in it is missing, or not as long as it was written.
    """
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        if content["format"] != FORMAT:
            raise DamagedError(f"format {content['format']} instead of {FORMAT}")
        manifest = _manifest(content)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DamagedError(f"{MANIFEST}: {error}") from error
    for file in manifest.files:
        try:
            size = (folder / file.name).stat().st_size
        except OSError as error:
            raise DamagedError(f"{file.name}: {error.strerror}") from error
        if size != file.size_bytes:
            raise DamagedError(f"{file.name} has {size:,} bytes instead of {file.size_bytes:,}")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Publishes a folder, atomically."""
    write_whole(folder / MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=2).encode())


def write_whole(path: Path, content: bytes) -> FileRecord:
    """Writes a file that is there with all its content or not at all; its record has the file's bare name."""
    scratch = path.with_name(f"{path.name}.partial")
    with scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    return FileRecord(name=path.name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def shard_record(content: dict[str, Any]) -> ShardRecord:
    """Makes a record of parsed JSON.

    Raises:
        TypeError, KeyError: if it is none.
    """
    return ShardRecord(**content | {"file": FileRecord(**content["file"])})


def _manifest(content: dict[str, Any]) -> Manifest:
    tokenizer: dict[str, Any] = content["tokenizer"]
    tokenizer["files"] = tuple(FileRecord(**file) for file in tokenizer["files"])
    content["tokenizer"] = TokenizerRecord(**tokenizer)
    content["documents_file"] = FileRecord(**content["documents_file"])
    content["shards"] = tuple(map(shard_record, content["shards"]))
    return Manifest(**content)
