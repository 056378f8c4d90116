"""Conversations to token ids, with loss on what the assistant says, end-of-turn token included.

    conversation -> template -> text with marks -> control tokens, and the text between them -> ids and loss

The ids are those that the tokenizer gives for the whole text: it is cut at control tokens only. What the assistant says
is known from the template's `{% generation %}` blocks. A template without them is rendered several times: a turn of the
assistant begins where the rendering of what comes before it ends, with the words that ask the assistant to speak; it
ends after the control token with which the rendering up to it ends. A token counts if any of its bytes is in a turn.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from titan_data.chat_template import ChatTemplate, Marks, Rendered, find_marks
from titan_data.conversations import ASSISTANT, Conversation, Message
from titan_data.errors import DataError
from titan_data.token_text import ControlToken, control_tokens, token_bytes
from titan_data.tokenizer import Tokenizer

_Span = tuple[int, int]


class ChatTokens(NamedTuple):
    """A conversation's tokens."""

    ids: NDArray[np.uint32]
    """[T]"""
    learned: NDArray[np.bool_]
    """Whether each is to be predicted: [T]"""


class _Stretch(NamedTuple):
    """Text between two control tokens, or the name of one."""

    text: str
    control: ControlToken | None
    learned: tuple[_Span, ...]
    """Offsets in its UTF-8 bytes between which it is the assistant's; for a control token, not empty if it is."""


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with a chat template."""

    tokenizer: Tokenizer
    template: ChatTemplate

    @property
    def identity(self) -> str:
        """Equal if and only if the same conversations give the same tokens."""
        control = {name: list(token) for name, token in self._control.items()}
        return json.dumps([1, self.tokenizer.hash, self.template.identity, control], sort_keys=True)

    def encode(self, conversations: Sequence[Conversation]) -> list[ChatTokens]:
        """Returns the tokens of each conversation.

        Raises:
            DataError: if the template refuses one, or it cannot be known what the assistant says; naming the place.
        """
        cut = [self._stretches(conversation) for conversation in conversations]
        texts = [stretch.text for stretches in cut for stretch in stretches if stretch.control is None]
        encoded = iter(self.tokenizer.encode_batch(texts))
        return [self._join(stretches, encoded.__next__) for stretches in cut]

    def prompt(self, messages: Sequence[Message]) -> NDArray[np.uint32]:
        """Returns the tokens after which the assistant is to speak: uint32 [T].

        Raises:
            DataError: if the template refuses the messages.
        """
        rendered = self.template.render(messages, add_generation_prompt=True)
        text, _ = _take_marks(rendered)
        stretches = self._cut(text, [], rendered.marks.escape)
        encoded = iter(self.tokenizer.encode_batch([s.text for s in stretches if s.control is None]))
        return self._join(stretches, encoded.__next__).ids

    @functools.cached_property
    def _control(self) -> dict[str, ControlToken]:
        return control_tokens(self.tokenizer)

    @functools.cached_property
    def _bytes(self) -> NDArray[np.int64]:
        return token_bytes(self.tokenizer)

    @functools.cached_property
    def _names(self) -> re.Pattern[str]:
        names = sorted(self._control, key=len, reverse=True)
        patterns = (
            (r"\s*" if self._control[name].takes_left else "")
            + re.escape(name)
            + (r"\s*" if self._control[name].takes_right else "")
            for name in names
        )
        return re.compile("|".join(patterns) or r"(?!)")

    def _stretches(self, conversation: Conversation) -> list[_Stretch]:
        try:
            marks = find_marks(conversation.messages, conversation.tools)
            rendered = self.template.render(conversation.messages, conversation.tools, marks=marks)
            text, said = _take_marks(rendered)
            if self.template.marks_turns:
                learned = _learned(said, conversation)
            else:
                learned = self._find_turns(text, conversation, marks)
        except DataError as error:
            raise DataError(f"{conversation.place}: {error}") from error
        return self._cut(text, learned, marks.escape)

    def _find_turns(self, text: str, conversation: Conversation, marks: Marks) -> list[_Span]:
        """Where the assistant says what is to be learned, in a text whose template does not mark it."""
        messages, spans = conversation.messages, []
        for number, learned in enumerate(conversation.learned):
            if not learned:
                continue
            before = self.template.render(
                messages[:number], conversation.tools, add_generation_prompt=True, marks=marks
            ).text
            through = self.template.render(messages[: number + 1], conversation.tools, marks=marks).text
            end = None
            if text.startswith(before) and through.startswith(before):
                end = self._end_of_turn(text, through, len(before))
            if end is None:
                raise DataError(
                    f"{self.template.name} writes message {number} in another way when more messages follow, so that "
                    "it is not known which tokens are the assistant's. Put {% generation %} and {% endgeneration %} "
                    "around what the assistant says, in a copy of it that sft.template names."
                )
            spans.append((len(before), end))
        return spans

    def _end_of_turn(self, text: str, through: str, start: int) -> int | None:
        """Where the turn ends that begins at `start` in both: in all the text, and in that which ends with the turn."""
        control = [match[0].strip() for match in self._names.finditer(through, start)]
        if not control:
            return len(through) if text.startswith(through) else None
        ends = [match for match in self._names.finditer(text, start) if match[0].strip() == control[-1]]
        last = control.count(control[-1]) - 1
        return ends[last].end() if last < len(ends) else None

    def _cut(self, text: str, learned: Sequence[_Span], escape: str) -> list[_Stretch]:
        """Cuts a text at its control tokens, and takes the escapes out of what lies between."""
        stretches: list[_Stretch] = []
        position = 0
        for match in [*self._names.finditer(text), None]:
            end = match.start() if match else len(text)
            if end > position:
                plain = text[position:end].replace(escape, "")
                inside = [(max(first, position), min(last, end)) for first, last in learned]
                spans = [
                    (_bytes(text[position:first], escape), _bytes(text[position:last], escape))
                    for first, last in inside
                    if first < last
                ]
                stretches.append(_Stretch(plain, None, tuple(spans)))
            if match:
                name = match[0].strip()
                said = any(first < match.end() and last > match.start() for first, last in learned)
                stretches.append(_Stretch(name, self._control[name], ((0, 1),) if said else ()))
                position = match.end()
        return stretches

    def _join(self, stretches: Sequence[_Stretch], next_ids: Callable[[], NDArray[np.uint32]]) -> ChatTokens:
        ids: list[NDArray[np.uint32]] = []
        learned: list[NDArray[np.bool_]] = []
        for stretch in stretches:
            if stretch.control is not None:
                found = np.array([stretch.control.id], dtype=np.uint32)
                flags = np.array([bool(stretch.learned)])
            else:
                found, flags = self._flag(stretch, next_ids())
            ids.append(found)
            learned.append(flags)
        return ChatTokens(
            np.concatenate([np.empty(0, dtype=np.uint32), *ids]),
            np.concatenate([np.empty(0, dtype=np.bool_), *learned]),
        )

    def _flag(self, stretch: _Stretch, ids: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """Which of a stretch's tokens hold something that the assistant says."""
        size = len(stretch.text.encode())
        if not stretch.learned or stretch.learned == ((0, size),):
            return ids, np.full(len(ids), bool(stretch.learned))
        ends = np.cumsum(self._bytes[ids])
        if ends[-1] == size:
            starts = ends - self._bytes[ids]
            return ids, np.any([(starts < end) & (ends > start) for start, end in stretch.learned], axis=0)
        # The tokenizer rewrites its text, so that its tokens' sizes do not tell where they are. Cut where turns begin.
        content, edges = stretch.text.encode(), sorted({0, size, *(edge for span in stretch.learned for edge in span)})
        parts = self.tokenizer.encode_batch([content[start:end].decode() for start, end in itertools.pairwise(edges)])
        flags = [
            np.full(len(part), any(first <= start < last for first, last in stretch.learned))
            for part, start in zip(parts, edges, strict=False)
        ]
        return np.concatenate(parts), np.concatenate(flags)


def _bytes(text: str, escape: str) -> int:
    return len(text.replace(escape, "").encode())


def _take_marks(rendered: Rendered) -> tuple[str, list[_Span]]:
    """Returns the text without the marks around what the assistant says, and where they were."""
    spans: list[_Span] = []
    pieces: list[str] = []
    size = start = 0
    begin, end = rendered.marks.begin, rendered.marks.end
    for piece in re.split(f"([{begin}{end}])", rendered.text):
        if piece == begin:
            start = size
        elif piece == end:
            spans.append((start, size))
        else:
            pieces.append(piece)
            size += len(piece)
    return "".join(pieces), spans


def _learned(said: list[_Span], conversation: Conversation) -> list[_Span]:
    """Chooses, from where the assistant speaks, what is to be learned."""
    turns = [
        learned
        for message, learned in zip(conversation.messages, conversation.learned, strict=True)
        if message["role"] == ASSISTANT
    ]
    if all(turns) and said:
        return said
    if len(said) != len(turns):
        raise DataError(
            f"the template has {len(said)} generation blocks for {len(turns)} messages of the assistant, so that it is "
            "not known which of them carry loss."
        )
    return [span for span, learned in zip(said, turns, strict=True) if learned]
