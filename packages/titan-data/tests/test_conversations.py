import json
from pathlib import Path

import pytest

from titan_data.conversations import conversation_of, read_conversations
from titan_data.errors import DataError
from titan_data.jsonl import jsonl_parts
from titan_data.records import text_of
from titan_data.source import Record
from titan_data.sources import NAMED

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}


def conversation(**fields):
    return conversation_of(Record(fields, lambda: "chats.jsonl, line 3"))


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [USER, REPLY]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                REPLY,
            ]
        },
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": [USER, REPLY]},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [USER], "completion": [REPLY]},
        {"prompt": "Hi", "completion": "Hello", "messages": None, "source": "a table"},
    ],
)
def test_all_formats_become_one(fields):
    found = conversation(**fields)
    assert found.messages == (USER, REPLY)
    assert found.learned == (False, True)


def test_a_prompt_and_messages_of_weight_0_carry_no_loss():
    prompt = conversation(prompt=[USER, REPLY, USER], completion="Bye")
    assert prompt.learned == (False, False, False, True)
    weighted = conversation(messages=[USER, REPLY | {"weight": 0}, USER, REPLY | {"weight": 1}])
    assert weighted.learned == (False, False, False, True)


def test_other_fields_of_messages_reach_the_template():
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    found = conversation(
        messages=[
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            USER | {"role": "tool", "name": "x"},
        ],
        tools=[{"name": "add"}],
    )
    assert found.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert found.messages[1]["content"] == ""
    assert found.messages[2]["name"] == "x"
    assert found.tools == ({"name": "add"},)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "Hi"}, "no conversation: it has 'text'"),
        ({}, "no conversation: it has no fields"),
        ({"prompt": "Hi"}, "no conversation: it has 'prompt'"),
        ({"messages": [USER, REPLY], "conversations": []}, "more than one conversation"),
        ({"messages": "Hi"}, '"messages" must be a list of objects, not str'),
        ({"messages": ["Hi"]}, '"messages" must be a list of objects'),
        ({"messages": []}, '"messages" is empty'),
        ({"messages": [{"content": "Hi"}]}, "message 0 has the role None, not one of system,"),
        ({"messages": [USER, {"role": "bot", "content": "Hi"}]}, "message 1 has the role 'bot'"),
        ({"messages": [USER, {"role": "assistant"}]}, r"message 1 \(assistant\) has no content"),
        ({"messages": [USER | {"content": 5}, REPLY]}, "the content of message 0 must be a list of objects, not int"),
        ({"messages": [USER | {"content": [{"type": "image_url"}]}, REPLY]}, "content of type 'image_url'; only text"),
        ({"messages": [USER]}, "nothing to learn"),
        ({"messages": [USER, REPLY | {"weight": 0}]}, "nothing to learn"),
        ({"messages": [USER, REPLY | {"weight": 0.5}]}, "message 1 has the weight 0.5; it must be 0 or 1"),
        ({"conversations": [{"from": "Bob", "value": "Hi"}]}, "turn 0 is from 'Bob', not one of system, human"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]},
            "arguments that are not JSON",
        ),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_place(fields, message):
    with pytest.raises(DataError, match=rf"^chats\.jsonl, line 3: .*{message}"):
        conversation(**fields)


class Parts:
    def __init__(self, parts):
        self.parts = parts

    def describe(self):
        return "some files"


def test_files_are_read_line_by_line_and_a_bad_line_is_named(tmp_path, source_file):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in ({"messages": [USER, REPLY]}, {"text": "Hi"})))
    conversations = read_conversations(Parts(jsonl_parts(source_file(path), text_of("text", None))))
    assert next(conversations).messages == (USER, REPLY)
    with pytest.raises(DataError, match=r"chats\.jsonl, line 2: no conversation"):
        next(conversations)


def test_plain_text_is_refused(pieces_source):
    with pytest.raises(DataError, match="2 files: plain text holds no conversations"):
        next(read_conversations(pieces_source(("Hi", True))))


def test_the_shipped_conversations_are_varied_and_whole():
    lines = Path(NAMED["conversations"].source).read_text(encoding="utf-8").splitlines()
    found = [conversation_of(Record(json.loads(line), lambda: "shipped")) for line in lines]
    assert 60 <= len(found) <= 100
    assert len({conversation.messages[0]["content"] for conversation in found}) == len(found)
    assert sum(len(conversation.messages) > 2 for conversation in found) > len(found) / 2
    for conversation in found:
        roles = [message["role"] for message in conversation.messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() == message["content"] != "" for message in conversation.messages)
