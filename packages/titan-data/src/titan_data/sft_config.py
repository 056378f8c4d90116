"""How conversations become rows to train on: a section of a training config.

Imports nothing but the standard library, so that a command line can show and check it at once.
"""

import datetime
from dataclasses import dataclass, field
from typing import Literal, get_args

from titan_data.config import WHERE

TooLong = Literal["drop", "truncate"]


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Supervised fine-tuning: conversations, with loss on what the assistant says.

    The conversations are `data.source`: JSONL or tables with OpenAI's `messages`, ShareGPT's `conversations`, or
    `prompt` and `completion`; or "conversations", the small set that comes with this package.
    """

    template: str = field(default="auto", metadata=WHERE)
    """The chat template: "auto" is the tokenizer's own; "llama3" and "chatml" are built in; anything else is the path
    of a Jinja template. Its text is part of the experiment's identity, wherever it lies."""

    too_long: TooLong = "drop"
    """What becomes of a conversation that does not fit into a row: it is left out, or keeps its beginning. Both are
    counted, and a beginning that leaves nothing to learn is left out."""

    pack: bool = True
    """Several conversations share a row, without seeing each other; otherwise each has a row of its own."""

    date: str = "2024-07-26"
    """The day, YYYY-MM-DD, that templates are told which ask for today's: so that the tokens are the same every day."""

    def problems(self) -> list[str]:
        """Every value that means nothing, each as one sentence; empty if there is none."""
        found = []
        if not self.template:
            found.append("data.sft.template is empty; name a template, or leave it out.")
        if self.too_long not in get_args(TooLong):
            found.append(f"data.sft.too_long is {self.too_long!r}; it must be 'drop' or 'truncate'.")
        if not _is_day(self.date):
            found.append(f"data.sft.date is {self.date!r}, which is no day; write it as YYYY-MM-DD.")
        return found


def _is_day(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
