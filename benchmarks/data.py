"""Text to tokens and tokens to batches, in tokens per CPU-second: ours beside what the libraries do by themselves.

    uv run python benchmarks/data.py                       # all: two minutes
    uv run python benchmarks/data.py --parts memmap --rounds 20

`text`, on one thread and the same documents (the standard library's source text, cut at lines into documents of about
3,000 characters), with one byte-level BPE of 32,000 entries:

    tiktoken      `Encoding.encode_ordinary` on each document, from a list in memory
    tokenizers    `Tokenizer.encode_batch`, from the same list
    cache         `tokenize_source`: reads and parses JSONL, tokenizes, hashes and writes the tokens, fsync and all
    pipeline      the same, and then every batch of an epoch from the tokens that it wrote

`memmap`, rows of 2,048 tokens in batches of 16, from 200 million tokens in documents of 50 to 1,500:

    plain         the loop of nanoGPT: int64 tokens and labels of random windows, each copied and then stacked
    least         one int64 copy of each window, with no labels: as little as can be done
    ours          `BatchLoader`: permutation, tokens, labels, positions and document ids, int64 all four

`memory`: what is resident and not a page of a file, while a loader hands out 100,000 batches.

Contenders take turns in one process; the ratio of each pair of turns is taken, and of those the quartiles.
"""

import argparse
import hashlib
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread, ours too

import numpy as np
import tiktoken
import tokenizers
import torch

from titan_data.bpe import train_bpe
from titan_data.config import DataConfig
from titan_data.hugging_face_tokenizer import HuggingFaceTokenizer
from titan_data.loader import BatchLoader
from titan_data.manifest import FORMAT, FileRecord, Manifest, ShardRecord, TokenizerRecord, write_manifest
from titan_data.source import all_pieces
from titan_data.sources import open_source
from titan_data.tiktoken_engine import translate
from titan_data.token_store import TokenStore, open_store
from titan_data.tokenizing import tokenize_source

VOCABULARY = 32_000
DOCUMENT_CHARS = 3_000
SEQ_LEN, ROWS = 2_048, 16
TOKENS = 200_000_000
SHARDS = 8


def text_part(folder: Path, rounds: int) -> None:
    """Tokenizing."""
    texts = documents(folder)
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = train_bpe(texts, VOCABULARY)
    tokenizer = HuggingFaceTokenizer(files, name="32k BPE")
    library = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    encoding: tiktoken.Encoding = translate(library).encoding
    began = time.process_time()
    tokenizer.speed_up()
    seconds = time.process_time() - began
    print(
        f"{len(texts):,} documents, {corpus.stat().st_size / 1e6:.1f} MB; now on {tokenizer.engine}, in {seconds:.1f} s"
    )
    source = open_source(DataConfig(source=str(corpus)), cache=folder / "cache", progress=print)
    targets = itertools.count()

    def cache() -> TokenStore:
        target = folder / f"tokens-{next(targets)}"
        target.mkdir()
        tokenize_source(target, source, tokenizer)
        return open_store(target)

    def pipeline() -> int:
        store = cache()
        loader = BatchLoader(store, seq_len=SEQ_LEN, global_batch_size=ROWS, seed=0, prefetch=0)
        for batch in loader:
            if loader.epoch >= 1:
                return store.token_count
            del batch
        raise AssertionError("a loader has no end")

    compare(
        {
            "tiktoken": lambda: sum(len(encoding.encode_ordinary(text)) for text in texts),
            "tokenizers": lambda: sum(len(e.ids) for e in library.encode_batch(texts, add_special_tokens=False)),
            "cache": lambda: cache().token_count,
            "pipeline": pipeline,
        },
        rounds,
    )


def memmap_part(folder: Path, rounds: int) -> None:
    """Batches."""
    store = random_store(folder / "random")
    tokens = np.concatenate([np.asarray(store.shard(i)) for i in range(SHARDS)])
    tokens.tofile(folder / "plain.bin")
    plain = np.memmap(folder / "plain.bin", dtype=np.uint16, mode="r")
    del tokens
    generator = np.random.default_rng(0)
    loader = BatchLoader(store, seq_len=SEQ_LEN, global_batch_size=ROWS, seed=0, prefetch=0)
    batches = 200

    def plain_loop() -> int:
        for _ in range(batches):
            starts = generator.integers(len(plain) - SEQ_LEN - 1, size=ROWS)
            torch.stack([torch.from_numpy(plain[i : i + SEQ_LEN].astype(np.int64)) for i in starts])
            torch.stack([torch.from_numpy(plain[i + 1 : i + 1 + SEQ_LEN].astype(np.int64)) for i in starts])
        return batches * ROWS * SEQ_LEN

    def least() -> int:
        for _ in range(batches):
            out = np.empty((ROWS, SEQ_LEN), dtype=np.int64)
            for row, start in enumerate(generator.integers(len(plain) - SEQ_LEN - 1, size=ROWS)):
                out[row] = plain[start : start + SEQ_LEN]
        return batches * ROWS * SEQ_LEN

    def ours() -> int:
        for _ in range(batches):
            next(loader)
        return batches * ROWS * SEQ_LEN

    compare({"plain": plain_loop, "least": least, "ours": ours}, rounds)


def memory_part(folder: Path, rounds: int) -> None:
    """Resident memory over many batches."""
    store = random_store(folder / "random")
    loader = BatchLoader(store, seq_len=512, global_batch_size=8, seed=0)
    for number, _ in enumerate(loader, start=1):
        if number in (100, 1_000, 10_000, 100_000):
            print(f"after {number:>7,} batches {anonymous_kib() / 1024:8.1f} MiB")
        if number == 100_000:
            break
    loader.close()


def documents(folder: Path) -> list[str]:
    """The standard library, cut at lines."""
    texts, text = [], ""
    source = open_source(DataConfig(), cache=folder / "cache", progress=print)
    for line in "".join(piece.text for piece in all_pieces(source)).splitlines(keepends=True):
        text += line
        if len(text) >= DOCUMENT_CHARS:
            texts.append(text)
            text = ""
    return [*texts, text]


def random_store(folder: Path) -> TokenStore:
    """Random tokens in random documents, in the form that titan-tokenize gives them."""
    if folder.exists():
        return open_store(folder)
    folder.mkdir()
    generator = np.random.default_rng(0)
    shards, starts, first = [], [], 0
    for index in range(SHARDS):
        lengths = generator.integers(50, 1500, size=TOKENS // SHARDS // 775)
        tokens = generator.integers(3, VOCABULARY, size=lengths.sum(), dtype=np.uint16)
        tokens[np.cumsum(lengths) - 1] = 1
        file = write(folder / f"shard-{index:05}.tokens.bin", tokens)
        shards.append(
            ShardRecord(file=file, tokens=len(tokens), documents=len(lengths), empty_documents=0, skipped_files=0)
        )
        starts.append(first + np.cumsum(lengths) - lengths)
        first += len(tokens)
    tokenizer = TokenizerRecord(
        name="none", hash="none", vocab_size=VOCABULARY, bos_id=0, eos_id=1, pad_id=2, engine="none", files=()
    )
    manifest = Manifest(
        format=FORMAT,
        fingerprint="none",
        source="random",
        tokenizer=tokenizer,
        token_type="uint16",
        documents_file=write(folder / "documents.bin", np.array([*np.concatenate(starts), first], dtype=np.int64)),
        shards=tuple(shards),
    )
    write_manifest(folder, manifest)
    return open_store(folder)


def write(path: Path, array: np.ndarray) -> FileRecord:
    """Writes an array's bytes."""
    array.tofile(path)
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    return FileRecord(name=path.name, size_bytes=array.nbytes, sha256=digest)


def compare(contenders: dict[str, Callable[[], int]], rounds: int) -> None:
    """Prints tokens per CPU-second of each, and its ratio to the first's in the same round."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            began = time.process_time()
            tokens = run()
            if number:  # the first round warms up
                speeds[name].append(tokens / (time.process_time() - began))
    first = next(iter(speeds.values()))
    for name, values in speeds.items():
        ratios = [value / other for value, other in zip(values, first, strict=True)]
        print(f"{name:12} {statistics.median(values) / 1e6:8.2f} M tokens/CPU-s   ratio {quartiles(ratios)}")


def quartiles(values: list[float]) -> str:
    """The median, and the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def anonymous_kib() -> int:
    """Resident memory that is no page of a file, in KiB (Linux)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


PARTS = {"text": text_part, "memmap": memmap_part, "memory": memory_part}


def main() -> None:
    """Runs the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            print(f"{part}:")
            PARTS[part](Path(folder), options.rounds)


if __name__ == "__main__":
    main()
