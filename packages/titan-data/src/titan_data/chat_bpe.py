"""A small tokenizer trained on what conversations say, so that fine-tuning can be tried without a download."""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_data.bpe import trained_bpe
from titan_data.cache import Progress
from titan_data.chat_template import BUILT_IN, written_by
from titan_data.conversations import conversation_of
from titan_data.errors import DataError
from titan_data.hugging_face_tokenizer import HuggingFaceTokenizer
from titan_data.pieces import pieces_of
from titan_data.source import Part, Piece, ReadCounts, RecordPart, Source
from titan_data.tokenizer import TOKENIZER_FILE


def trained_chat_bpe(
    source: Source, vocab_size: int, template: str, folder: Path, *, progress: Progress
) -> HuggingFaceTokenizer:
    """Returns a byte-level BPE of `vocab_size` entries for the messages of some conversations, training it once.

    Args:
        source: the conversations.
        vocab_size: entries, of which some are the control tokens of the template.
        template: the name of a built-in template.
        folder: where trained tokenizers are kept.
        progress: is told when one is trained.

    Raises:
        DataError: if `vocab_size` is too small, or the template is not built in.
    """
    if template not in BUILT_IN:
        raise DataError(
            f"a tokenizer that is trained on the conversations has the control tokens of a built-in template, and "
            f"sft.template is {template!r}. Set it to one of {', '.join(BUILT_IN)}, or name a tokenizer with "
            "data.tokenizer."
        )
    control = written_by(template)
    trained = trained_bpe(_Messages(source), vocab_size - len(control), folder, progress=progress)
    return with_control_tokens(trained, control)


def with_control_tokens(tokenizer: HuggingFaceTokenizer, names: Sequence[str]) -> HuggingFaceTokenizer:
    """Returns the tokenizer with more special tokens, whose ids follow its own."""
    settings = json.loads(tokenizer.files[TOKENIZER_FILE])
    settings["added_tokens"] += [
        {
            "id": tokenizer.vocab_size + number,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, name in enumerate(names)
    ]
    files = dict(tokenizer.files) | {TOKENIZER_FILE: json.dumps(settings, ensure_ascii=False).encode()}
    return HuggingFaceTokenizer(files, name=tokenizer.name)


@dataclass(frozen=True)
class _Messages:
    """The text of conversations, each message a document; a `Source`."""

    source: Source

    @functools.cached_property
    def fingerprint(self) -> str:
        return f"messages of {self.source.fingerprint}"

    @functools.cached_property
    def parts(self) -> Sequence[Part]:
        return [_MessagesPart(part) for part in self.source.parts]

    def describe(self) -> str:
        return self.source.describe()


@dataclass(frozen=True)
class _MessagesPart:
    part: Part

    @property
    def size_bytes(self) -> int:
        return self.part.size_bytes

    def pieces(self, counts: ReadCounts) -> Iterator[Piece]:
        if isinstance(self.part, RecordPart):
            for record in self.part.records():
                for message in conversation_of(record).messages:
                    yield from pieces_of(message["content"])
