"""Conversations: the common formats they come in, made one and checked.

    OpenAI            {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}
    ShareGPT          {"conversations": [{"from": "human", "value": "..."}, ...]}
    prompt and reply  {"prompt": "...", "completion": "..."}, each text or a list of messages

A record is recognised by its fields, each by itself. Messages keep fields of their own (`tool_calls`, `name`, ...) for
the chat template. An assistant's message of `"weight": 0`, as OpenAI has it, and all of a prompt carry no loss.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from titan_data.errors import DataError
from titan_data.source import Record, RecordPart, Source, read_records

Message = dict[str, Any]

ASSISTANT = "assistant"
_ROLES = ("system", "developer", "user", ASSISTANT, "tool")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "assistant": ASSISTANT,
    "tool": "tool",
    "observation": "tool",
}
_FORMATS = (
    'a list "messages" of {"role", "content"} (OpenAI), a list "conversations" of {"from", "value"} (ShareGPT), or '
    '"prompt" and "completion"'
)


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's form, and which of them are to be learned."""

    messages: tuple[Message, ...]
    learned: tuple[bool, ...]
    """For each message: whether the assistant says it and its tokens carry loss."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Descriptions of functions that the assistant may call, for the template."""
    find_place: Callable[[], str] = lambda: "a conversation"

    @property
    def place(self) -> str:
        """The file and line, or row, for messages."""
        return self.find_place()


class _MalformedError(Exception):
    """What is wrong with a conversation; its place is added where it is known."""


def read_conversations(source: Source) -> Iterator[Conversation]:
    """Yields the conversations of a source, in order.

    Raises:
        DataError: for a source without fields, or a record that is no conversation, naming file and line.
    """
    for part in source.parts:
        if not isinstance(part, RecordPart):
            raise DataError(
                f"{source.describe()}: plain text holds no conversations. Name JSONL, Parquet or Arrow files (with "
                "data.format, if their names do not tell) whose records have " + _FORMATS + "."
            )
        for record in read_records(part):
            yield conversation_of(record)


def conversation_of(record: Record) -> Conversation:
    """Returns the conversation that a record holds, whichever format it is in.

    Raises:
        DataError: if it is no conversation, naming its place.
    """
    try:
        messages, given = _messages(record.fields)
        learned = tuple(
            number >= given and message["role"] == ASSISTANT and _weight(message, number) > 0
            for number, message in enumerate(messages)
        )
        if not any(learned):
            raise _MalformedError("nothing to learn: the assistant says nothing in it that carries loss")
        tools = _list(record.fields.get("tools") or [], '"tools"')
        return Conversation(tuple(messages), learned, tuple(tools), record.find_place)
    except _MalformedError as error:
        raise DataError(f"{record.place}: {error}.") from None


def _messages(fields: Mapping[str, Any]) -> tuple[list[Message], int]:
    """The messages, and how many of them are a prompt."""
    found = [name for name in ("messages", "conversations", "prompt") if fields.get(name) is not None]
    if len(found) != 1 or (found == ["prompt"] and "completion" not in fields):
        has = ", ".join(map(repr, fields)) or "no fields"
        what = "more than one conversation" if len(found) > 1 else "no conversation"
        raise _MalformedError(f"{what}: it has {has}. A record has {_FORMATS}")
    match found[0]:
        case "messages":
            return _checked(fields["messages"], '"messages"'), 0
        case "conversations":
            return _from_sharegpt(fields["conversations"]), 0
        case _:
            prompt = _side(fields["prompt"], "prompt", "user")
            return prompt + _side(fields["completion"], "completion", ASSISTANT), len(prompt)


def _side(value: Any, name: str, role: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else _checked(value, f'"{name}"')


def _from_sharegpt(value: Any) -> list[Message]:
    messages = []
    for number, turn in enumerate(_list(value, '"conversations"')):
        if "role" in turn and "from" not in turn:  # many files have the field's name, and messages as OpenAI's
            return _checked(value, '"conversations"')
        role = _SHAREGPT_ROLES.get(str(turn.get("from")))
        if role is None:
            known = ", ".join(_SHAREGPT_ROLES)
            raise _MalformedError(f"turn {number} is from {turn.get('from')!r}, not one of {known}")
        messages.append({"role": role, "content": turn.get("value")} | _others(turn, "from", "value"))
    return _checked(messages, '"conversations"')


def _checked(value: Any, what: str) -> list[Message]:
    messages = []
    for number, message in enumerate(_list(value, what)):
        role = message.get("role")
        if role not in _ROLES:
            raise _MalformedError(f"message {number} has the role {role!r}, not one of {', '.join(_ROLES)}")
        # Tables have a column for what only some of the messages have.
        message = {name: value for name, value in message.items() if value is not None}
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [_call(call, number) for call in _list(calls, f'"tool_calls" of message {number}')]
        content = message.get("content")
        if content is None and not calls:
            raise _MalformedError(f"message {number} ({role}) has no content")
        messages.append(message | {"content": "" if content is None else _text(content, number)})
    if not messages:
        raise _MalformedError(f"{what} is empty")
    return messages


def _call(call: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A call as templates want it: its arguments as an object, which OpenAI's format has as text."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except ValueError:
        raise _MalformedError(f"message {number} calls a function with arguments that are not JSON") from None


def _text(content: Any, number: int) -> str:
    if isinstance(content, str):
        return content
    parts = _list(content, f"the content of message {number}")
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _MalformedError(f"message {number} has content of type {part.get('type')!r}; only text can be read")
    return "".join(part["text"] for part in parts)


def _weight(message: Message, number: int) -> float:
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise _MalformedError(f"message {number} has the weight {weight!r}; it must be 0 or 1")
    return weight


def _list(value: Any, what: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise _MalformedError(f"{what} must be a list of objects, not {type(value).__name__}")
    return value


def _others(turn: Mapping[str, Any], *names: str) -> Message:
    return {name: value for name, value in turn.items() if name not in names}
