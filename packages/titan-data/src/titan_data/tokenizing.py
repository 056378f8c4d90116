"""From a source to a folder of tokens, shard by shard, in any number of processes.

    source -> parts -> shards of consecutive parts -> one file of tokens each -> documents.bin -> manifest.json

Which parts make up a shard depends on the source alone, and a shard's file on its parts and the tokenizer: so the
folder is the same however many processes wrote it. A build that was killed goes on with the shards that are missing.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from titan_data.cache import DamagedError, Progress
from titan_data.errors import DataError
from titan_data.manifest import (
    DOCUMENTS,
    FORMAT,
    MANIFEST,
    PLAN,
    TOKENIZER,
    FileRecord,
    Manifest,
    ShardRecord,
    TokenizerRecord,
    read_manifest,
    write_manifest,
    write_whole,
)
from titan_data.orphans import end_with_parent
from titan_data.shards import PASSING_FILES, Report, Shard, finished_shard, make_shard, plan_shards
from titan_data.source import Source, source_bytes
from titan_data.threads import one_thread
from titan_data.tokenizer import Tokenizer

# Of text in a shard: some 15 seconds of a core's work, and few enough files for terabytes.
SHARD_BYTES = 128_000_000
# Text above which it pays to look for a faster engine.
_MUCH_BYTES = 8_000_000
_SECONDS_BETWEEN_MESSAGES = 2.0


def stream_fingerprint(source: Source, tokenizer: Tokenizer) -> str:
    """Returns what a stream of tokens is identified by: equal if the documents, their order and the tokenizer are."""
    # The number changes when the same documents and tokenizer come to give other tokens.
    identity = f"titan-data stream 1, corpus {source.fingerprint}, tokenizer {tokenizer.hash}"
    return hashlib.sha256(identity.encode()).hexdigest()


def tokenize_source(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    *,
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    report: Report | None = None,
) -> Manifest:
    """Tokenizes a source into a folder, in memory that does not grow with it.

    Args:
        folder: where the tokens go; what an earlier call for the same source and tokenizer has finished there is kept.
        source: the documents.
        tokenizer: makes the tokens.
        workers: processes; 1 is this one, with a thread for each core. More are started afresh, so the program's main
            module must be guarded by `if __name__ == "__main__"`.
        shard_bytes: text in a shard, at least; a part is never divided.
        report: is called with the bytes and tokens that were added, as they are.

    Raises:
        DataError: if the source is malformed or too small to predict anything from, or the folder holds something else.
    """
    if workers < 1:
        raise DataError(f"{workers} workers cannot tokenize; it takes at least 1.")
    if shard_bytes < 1:
        raise DataError(f"a shard of {shard_bytes} bytes of text is none; it takes at least 1.")
    report = report or (lambda size, tokens: None)
    if manifest := check_folder(folder, source, tokenizer, shard_bytes=shard_bytes):
        _clear_up(folder)  # killed after the manifest was written
        report(source_bytes(source), manifest.tokens)
        return manifest
    shards = plan_shards(source, shard_bytes)
    write_whole(folder / PLAN, _plan(source, tokenizer, shard_bytes))
    if source_bytes(source) > _MUCH_BYTES:
        tokenizer.speed_up()
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)

    records = {shard.index: record for shard in shards if (record := finished_shard(shard, folder)) is not None}
    for index, record in records.items():
        report(shards[index].size_bytes, record.tokens)
    missing = [shard for shard in shards if shard.index not in records]
    make = functools.partial(make_shard, folder=folder, dtype=dtype)
    if workers == 1 or len(missing) <= 1:
        for shard in missing:
            records[shard.index] = make(shard, tokenizer=tokenizer, report=report)
    else:
        for shard, record in _in_processes(make, missing, tokenizer, workers):
            records[shard.index] = record
            report(shard.size_bytes, record.tokens)

    ordered = [records[shard.index] for shard in shards]
    if sum(record.tokens for record in ordered) < 2:
        raise DataError(
            f"the corpus is empty: {source.describe()}, with {sum(record.tokens for record in ordered)} tokens, and it "
            "takes at least 2. Name one with text."
        )
    manifest = Manifest(
        format=FORMAT,
        fingerprint=stream_fingerprint(source, tokenizer),
        source=source.describe(),
        tokenizer=_save_tokenizer(folder, tokenizer),
        token_type=dtype.name,
        documents_file=_join_documents(folder, shards, ordered),
        shards=tuple(ordered),
    )
    write_manifest(folder, manifest)
    _clear_up(folder)
    return manifest


def check_folder(
    folder: Path, source: Source, tokenizer: Tokenizer, *, shard_bytes: int = SHARD_BYTES
) -> Manifest | None:
    """Returns the manifest if these tokens stand in the folder already, None if they may be written there.

    Raises:
        DataError: if something else stands there, or was begun.
    """
    if (folder / MANIFEST).exists():
        try:
            manifest = read_manifest(folder)
        except DamagedError as error:
            raise DataError(
                f"the tokens in {folder} are damaged ({error}). Delete the folder to build it anew."
            ) from error
        if manifest.fingerprint != stream_fingerprint(source, tokenizer):
            raise DataError(
                f"{folder} holds other tokens: those of {manifest.source}, made by {manifest.tokenizer.name}. "
                "Choose another folder, or delete this one."
            )
        return manifest
    if (folder / PLAN).exists():
        if (folder / PLAN).read_bytes() != _plan(source, tokenizer, shard_bytes):
            raise DataError(
                f"{folder} holds a build of another corpus or tokenizer, or with other shards, that was not finished. "
                "Choose another folder, or delete this one."
            )
        return None
    present = folder.iterdir() if folder.exists() else ()
    if strange := [path.name for path in present if path.suffix not in (".lock", ".partial")]:
        raise DataError(f"{folder} is not empty: it holds {min(strange)}. Choose another folder.")
    return None


def _plan(source: Source, tokenizer: Tokenizer, shard_bytes: int) -> bytes:
    """What is being built, as it is noted while it is."""
    fingerprint = stream_fingerprint(source, tokenizer)
    return json.dumps({"format": FORMAT, "fingerprint": fingerprint, "shard_bytes": shard_bytes}).encode()


def _clear_up(folder: Path) -> None:
    """Removes what is needed only while a build is not finished."""
    for pattern in (*PASSING_FILES, "*.partial", PLAN):
        for path in folder.glob(pattern):
            path.unlink()


def messages(progress: Progress, total_bytes: int) -> Report:
    """Returns a report that tells the share and the tokens done, as a line of text every few seconds."""
    done = [0, 0]
    reported = time.monotonic()

    def report(size: int, tokens: int) -> None:
        nonlocal reported
        done[0] += size
        done[1] += tokens
        if time.monotonic() - reported > _SECONDS_BETWEEN_MESSAGES:
            reported = time.monotonic()
            progress(f"tokenizing: {done[0] / max(1, total_bytes):.0%} of the text, {done[1]:,} tokens")

    return report


def _in_processes(
    make: Callable[..., ShardRecord], shards: Sequence[Shard], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[Shard, ShardRecord]]:
    # Started afresh: a fork would copy threads' locks, and whatever the training process has open on a GPU.
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(shards)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer,),
    )
    try:
        futures = {pool.submit(_work, make, shard): shard for shard in shards}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that tokenized has died. The system may have run out of memory: start again with fewer workers. "
            "Or the program's main module, which each process imports, is not guarded by if __name__ == '__main__'."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    end_with_parent()
    one_thread()
    _worker_tokenizer = tokenizer


def _work(make: Callable[..., ShardRecord], shard: Shard) -> ShardRecord:
    return make(shard, tokenizer=_worker_tokenizer, report=lambda size, tokens: None)


def _join_documents(folder: Path, shards: Sequence[Shard], records: Sequence[ShardRecord]) -> FileRecord:
    path = folder / DOCUMENTS
    digest, size, first = hashlib.sha256(), 0, 0
    scratch = path.with_name(f"{path.name}.partial")
    with scratch.open("wb") as file:
        for shard, record in zip(shards, records, strict=True):
            starts = np.fromfile(folder / shard.documents_name, dtype=np.int64) + first
            first += record.tokens
            size += file.write(starts.tobytes())
            digest.update(starts.tobytes())
        end = np.int64(first).tobytes()
        size += file.write(end)
        digest.update(end)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    return FileRecord(name=DOCUMENTS, size_bytes=size, sha256=digest.hexdigest())


def _save_tokenizer(folder: Path, tokenizer: Tokenizer) -> TokenizerRecord:
    (folder / TOKENIZER).mkdir(exist_ok=True)
    files = [
        dataclasses.replace(write_whole(folder / TOKENIZER / name, content), name=f"{TOKENIZER}/{name}")
        for name, content in tokenizer.files.items()
    ]
    return TokenizerRecord(
        name=tokenizer.name,
        hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        engine=tokenizer.engine,
        files=tuple(files),
    )
