"""A tokenized corpus on disk, mapped into memory: one stream of tokens over any number of shards.

`manifest.py` describes the folder. Any stretch of the stream is read in constant time. Only so many shards are mapped
at a time, because each mapping takes a file descriptor.
"""

import bisect
import functools
import hashlib
import itertools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from titan_data.cache import DamagedError
from titan_data.manifest import FileRecord, Manifest, read_manifest
from titan_data.tokenizer import Tokenizer
from titan_data.tokenizer_files import tokenizer_from_files

_MAPPED_SHARDS = 256
_CHECKED_TOKENS = 1 << 24


class TokenStore:
    """A tokenized corpus; a `TokenStream`. Its `len` counts documents, and an index gives one document's tokens."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Maps a folder that `read_manifest` has found whole."""
        self.folder, self.manifest = folder, manifest
        self.document_starts: NDArray[np.int64] = _map(
            folder / manifest.documents_file.name, np.dtype(np.int64), manifest.documents + 1
        )
        self._shard_starts = [0, *itertools.accumulate(shard.tokens for shard in manifest.shards)]
        self._mapped = functools.lru_cache(_MAPPED_SHARDS)(self.shard)
        for index in range(min(len(manifest.shards), _MAPPED_SHARDS)):  # what is mapped may be deleted
            self._mapped(index)

    def __reduce__(self) -> tuple:
        return open_store, (self.folder,)

    @property
    def token_count(self) -> int:
        """How many tokens, end-of-text tokens included: N."""
        return self._shard_starts[-1]

    @property
    def eos_id(self) -> int:
        """The token that ends each document."""
        return self.manifest.tokenizer.eos_id

    def copy_tokens(self, start: int, out: NDArray[np.integer]) -> None:
        """Copies the tokens from `start` on into `out`, [T]; the stream has to reach that far."""
        shard = bisect.bisect_right(self._shard_starts, start) - 1
        first = start - self._shard_starts[shard]
        tokens = self._mapped(shard)[first : first + len(out)]
        out[: len(tokens)] = tokens
        if len(tokens) < len(out):
            self.copy_tokens(start + len(tokens), out[len(tokens) :])

    def read(self, start: int, end: int) -> NDArray[np.uint32]:
        """Returns a copy of the tokens in [start, end): uint32 [end - start].

        Raises:
            IndexError: if the stream does not reach that far.
        """
        if not 0 <= start <= end <= self.token_count:
            raise IndexError(f"tokens [{start}, {end}) of {self.token_count}")
        out = np.empty(end - start, dtype=np.uint32)
        if end > start:
            self.copy_tokens(start, out)
        return out

    def shard(self, index: int) -> NDArray[np.unsignedinteger]:
        """Maps the tokens of one shard: uint16 or uint32 [its tokens], read-only."""
        shard = self.manifest.shards[index]
        return _map(self.folder / shard.file.name, np.dtype(self.manifest.token_type), shard.tokens)

    def load_tokenizer(self) -> Tokenizer:
        """Loads the tokenizer that made the tokens."""
        record = self.manifest.tokenizer
        files = {Path(file.name).name: (self.folder / file.name).read_bytes() for file in record.files}
        return tokenizer_from_files(files, name=record.name)

    def __len__(self) -> int:
        return len(self.document_starts) - 1

    def __getitem__(self, document: int) -> NDArray[np.uint32]:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        start, end = self.document_starts[document : document + 2].tolist()
        return self.read(start, end)


def open_store(folder: Path) -> TokenStore:
    """Opens a tokenized corpus.

    Raises:
        FileNotFoundError: if the folder is not there.
        DamagedError: if a file in it is missing, or not as long as it was written.
    """
    return TokenStore(folder, read_manifest(folder))


def verify_store(folder: Path) -> TokenStore:
    """Opens a tokenized corpus after reading all of it: hashes, ids, and where documents begin and end.

    Raises:
        FileNotFoundError: if the folder is not there.
        DamagedError: at the first thing that is not as it was written.
    """
    store = open_store(folder)
    for file in store.manifest.files:
        _verify_hash(folder, file)
    starts = store.document_starts
    if starts[0] != 0 or starts[-1] != store.token_count or not (np.diff(starts) > 0).all():
        raise DamagedError(f"{store.manifest.documents_file.name}: the documents do not follow each other")
    first = 0
    for index, shard in enumerate(store.manifest.shards):
        tokens = store.shard(index)
        for start in range(0, len(tokens), _CHECKED_TOKENS):
            largest = int(tokens[start : start + _CHECKED_TOKENS].max())
            if largest >= store.manifest.tokenizer.vocab_size:
                raise DamagedError(f"{shard.file.name}: token {largest} is not in the vocabulary")
        ends = starts[(starts > first) & (starts <= first + len(tokens))] - first - 1
        if not (tokens[ends] == store.eos_id).all():
            raise DamagedError(f"{shard.file.name}: a document does not end with the end-of-text token")
        first += len(tokens)
    return store


def _verify_hash(folder: Path, record: FileRecord) -> None:
    with (folder / record.name).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
            raise DamagedError(f"{record.name}: its bytes are not those that were written (SHA-256)")


def _map(path: Path, dtype: np.dtype, count: int) -> NDArray:
    if count == 0:
        return np.empty(0, dtype=dtype)  # an empty file cannot be mapped
    # As a plain array: slicing a numpy.memmap costs a microsecond more each time.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(count,)))
