"""What to read, how to cut it into tokens, and where to keep them: the data section of a training config.

Imports nothing but the standard library, so that a command line can show and check it at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

WHERE = {"part": "where"}
HOW = {"part": "how"}

Format = Literal["auto", "text", "jsonl", "parquet", "arrow"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A corpus, its tokenizer, and the order in which its windows are read.

    `source`, `format` and `tokenizer` are places: what enters an experiment's identity is the content found
    there (`TokenDataset.fingerprint`), so that a corpus may move.
    """

    source: str = field(default="stdlib", metadata=WHERE)
    """The corpus: "stdlib" (the source text of this machine's Python standard library); a file, a folder, a glob or
    a URL (s3://bucket/*.jsonl.gz) of text files (.txt, .md, .py, ...: one document a file) or .jsonl files (one
    document a line), plain or as .gz or .zst, or of .parquet or .arrow files (one document a row); a folder written by
    titan-tokenize or by Dataset.save_to_disk; "hf:OWNER/NAME[:CONFIG[:SPLIT]]", a dataset of the Hugging Face hub;
    "c4" (allenai/c4, English), or "c4_test" (the folder tests/assets/c4_test); or "MODULE:NAME", a source of your own:
    what this function or class of an importable module makes."""

    format: Format = field(default="auto", metadata=WHERE)
    """How to read the files, or "auto": by suffix. In a folder it also says which files count."""

    text_field: str = "text"
    """The field of a .jsonl line, or the column of a table, that holds the document's text."""

    template: str | None = None
    """Instead of text_field: a document put together from several fields, e.g. "{question}\\n{answer}"."""

    tokenizer: str = field(default="bpe", metadata=WHERE)
    """The tokenizer: "bpe" trains a byte-level BPE on the corpus; anything else is the path of a Hugging Face
    tokenizer.json, of Meta's tokenizer.model for Llama 3, of a .tiktoken file, or of a folder that holds one. A folder
    written by titan-tokenize has its own."""

    vocab_size: int = 4096
    """Entries of the trained BPE's vocabulary, bytes and special tokens included; only for tokenizer "bpe"."""

    confine_attention: bool = True
    """Positions and document ids restart at each document, so that attention stays inside it; otherwise each
    row counts as one document."""

    shuffle: bool = True
    """Read the windows of each epoch in a new random order instead of the corpus's own."""

    cache_dir: str | None = field(default=None, metadata=WHERE)
    """Folder for tokens, trained tokenizers and copies of remote files; default $TITAN_CACHE, else
    $XDG_CACHE_HOME/titan, else ~/.cache/titan."""

    tokenize_workers: int = field(default=1, metadata=HOW)
    """Processes that tokenize a corpus which is not in the cache yet; 1: this process, with a thread for each core."""

    def problems(self) -> list[str]:
        """Every value that means nothing, each as one sentence; empty if there is none."""
        places = {
            "source": self.source,
            "tokenizer": self.tokenizer,
            "text_field": self.text_field,
            "cache_dir": self.cache_dir,
        }
        return [f"data.{name} is empty; name one, or leave it out." for name, value in places.items() if value == ""]


def named_problems(what: str, corpora: Mapping[str, str]) -> list[str]:
    """What is wrong with the names of corpora and with where they lie, each as one sentence.

    Args:
        what: the field, for messages.
        corpora: name -> corpus, as in `DataConfig.source`.
    """
    found = [f"{what} has an empty name for {corpus!r}; name it." for name, corpus in corpora.items() if not name]
    return found + [f"{what} names no corpus for {name!r}; name one." for name, corpus in corpora.items() if not corpus]
