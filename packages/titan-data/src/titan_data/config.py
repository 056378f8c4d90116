"""What to read, how to cut it into tokens, and where to keep them: the data section of a training config.

Imports nothing but the standard library, so that a command line can show and check it at once.
"""

from dataclasses import dataclass, field
from typing import Literal

WHERE = {"part": "where"}
HOW = {"part": "how"}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A corpus, its tokenizer, and the order in which its windows are read.

    `source`, `format` and `tokenizer` are places: what enters an experiment's identity is the content found
    there (`TokenDataset.fingerprint`), so that a corpus may move.
    """

    source: str = field(default="stdlib", metadata=WHERE)
    """The corpus: "stdlib" (the source text of this machine's Python standard library), or a file, a folder or
    a glob of text files (.txt, .md, .py, ...: one document a file) and .jsonl files (one document a line)."""

    format: Literal["auto", "text", "jsonl"] = field(default="auto", metadata=WHERE)
    """How to read the files: "text", "jsonl", or "auto" (by suffix). In a folder it also says which files count."""

    text_field: str = "text"
    """The field of a .jsonl line that holds the document's text."""

    tokenizer: str = field(default="bpe", metadata=WHERE)
    """The tokenizer: "bpe" trains a byte-level BPE on the corpus; anything else is the path of a Hugging Face
    tokenizer.json or of a folder that holds one."""

    vocab_size: int = 4096
    """Entries of the trained BPE's vocabulary, bytes and special tokens included; only for tokenizer "bpe"."""

    confine_attention: bool = True
    """Positions and document ids restart at each document, so that attention stays inside it; otherwise each
    row counts as one document."""

    shuffle: bool = True
    """Read the windows of each epoch in a new random order instead of the corpus's own."""

    cache_dir: str | None = field(default=None, metadata=WHERE)
    """Folder for tokens and trained tokenizers; default $TITAN_CACHE, else $XDG_CACHE_HOME/titan, else
    ~/.cache/titan."""

    prefetch: int = field(default=2, metadata=HOW)
    """Batches that a background thread prepares ahead; 0 prepares each batch when it is asked for."""
