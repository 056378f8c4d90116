"""Chat templates: Jinja programs that write a conversation as one text, as Hugging Face's tokenizers bring them.

They run in Jinja's sandbox, with the names that such templates expect: `messages`, `tools`, `add_generation_prompt`,
`bos_token` and its like, `raise_exception`, `strftime_now`, the filter `tojson`, the block `{% generation %}`.

The text comes back with marks in it, which are noncharacters of Unicode that do not occur in the conversation:

    escape        stands within what looks like a control token in a message, so that only the template writes control
                  tokens
    begin, end    stand around what a `{% generation %}` block writes: the assistant's words
"""

import copy
import datetime
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox

from titan_data.errors import DataError, NotFoundError
from titan_data.sft_config import SFTConfig
from titan_data.token_text import control_tokens
from titan_data.tokenizer import SETTINGS_FILES, Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
_MARKS = "titan_marks"
_NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))

BUILT_IN = {
    "llama3": """
{{- bos_token -}}
{%- if tools -%}{{- raise_exception('this template has no place for tools') -}}{%- endif -%}
{%- for message in messages -%}
    {%- if message.tool_calls -%}{{- raise_exception('this template has no place for tool calls') -}}{%- endif -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- message.content | trim + '<|eot_id|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message.content | trim + '<|eot_id|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
""",
    "chatml": """
{%- if tools -%}{{- raise_exception('this template has no place for tools') -}}{%- endif -%}
{%- for message in messages -%}
    {%- if message.tool_calls -%}{{- raise_exception('this template has no place for tool calls') -}}{%- endif -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message.content + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
""",
}
_WRITTEN_BY = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}


class Marks(NamedTuple):
    """The characters that mark a rendered text."""

    escape: str
    begin: str
    end: str


class Rendered(NamedTuple):
    """A conversation as text with marks in it."""

    text: str
    marks: Marks


class ChatTemplate:
    """A template ready to render, with what it is told beside the conversation."""

    def __init__(self, text: str, *, names: Mapping[str, str], control: Iterable[str], date: str, name: str) -> None:
        """Compiles a template.

        Args:
            text: the program.
            names: what it may write by name: {"bos_token": "<s>"}.
            control: the names of control tokens, which are escaped in messages.
            date: what it is told is today: YYYY-MM-DD.
            name: what it is called, for messages.

        Raises:
            DataError: if it is no Jinja template, or the date is none.
        """
        self.text, self.names, self.date, self.name = text, dict(names), date, name
        self.marks_turns = re.search(r"{%-?\s*generation\s*-?%}", text) is not None
        self._control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or r"(?!)")
        try:
            today = datetime.date.fromisoformat(date)
        except ValueError as error:
            raise DataError(f"sft.date is {date!r}, not a day as YYYY-MM-DD ({error}).") from None
        try:
            self._template = _environment().from_string(
                text, globals={"raise_exception": _raise_exception, "strftime_now": today.strftime}
            )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"{name}, line {error.lineno}: not a Jinja template ({error.message}).") from error

    @property
    def identity(self) -> str:
        """Equal if and only if the same messages give the same text."""
        return json.dumps([self.text, self.names, self.date], sort_keys=True)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = False,
        marks: Marks | None = None,
    ) -> Rendered:
        """Writes messages as text.

        Args:
            messages: each with `role`, `content` and what else the template reads.
            tools: descriptions of functions, if the template knows any.
            add_generation_prompt: end with the words after which the assistant speaks.
            marks: those to use, so that renderings can be compared; default: any that do not occur in the messages.

        Raises:
            DataError: if the template refuses the messages, or fails.
        """
        marks = marks or find_marks(messages, tools)
        escape = functools.partial(self._control.sub, lambda name: name[0][0] + marks.escape + name[0][1:])
        try:
            text = self._template.render(
                messages=_map_text(messages, escape),
                tools=_map_text(tools, escape) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{_MARKS: marks},
                **self.names,
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise DataError(f"{self.name} cannot write this conversation: {error}") from error
        return Rendered(text, marks)


def open_template(config: SFTConfig, tokenizer: Tokenizer) -> ChatTemplate:
    """Finds the chat template that a configuration names.

    Raises:
        NotFoundError: if it is not there.
        DataError: if it is no template, or writes control tokens that the tokenizer does not have.
    """
    control = control_tokens(tokenizer)
    name = f"the chat template {config.template}"
    if config.template == "auto":
        text, name = _own_template(tokenizer), f"the chat template of {tokenizer.name}"
    elif config.template in BUILT_IN:
        text = BUILT_IN[config.template]
        if missing := [token for token in _WRITTEN_BY[config.template] if token not in control]:
            raise DataError(
                f"the chat template {config.template!r} writes {', '.join(missing)}, which {tokenizer.name} does not "
                "have as special tokens. Choose the template that belongs to the tokenizer."
            )
    else:
        path = Path(config.template).expanduser()
        if not path.is_file():
            raise NotFoundError(
                f"{config.template!r} is neither 'auto', nor one of {', '.join(map(repr, BUILT_IN))}, nor a file."
            )
        text = path.read_text(encoding="utf-8")
    return ChatTemplate(text, names=_names(tokenizer), control=control, date=config.date, name=name)


def written_by(template: str) -> tuple[str, ...]:
    """Returns the control tokens that a built-in template writes."""
    return _WRITTEN_BY[template]


def find_marks(*content: Any) -> Marks:
    """Returns characters that occur nowhere in some messages or tools.

    Raises:
        DataError: if there are none left.
    """
    text = json.dumps(content, ensure_ascii=False, default=str)
    free = (mark for mark in _NONCHARACTERS if mark not in text)
    try:
        return Marks(next(free), next(free), next(free))
    except StopIteration:
        raise DataError(
            "the messages hold all of Unicode's noncharacters, U+FDD0 to U+FDEF: this is not text"
        ) from None


def _own_template(tokenizer: Tokenizer) -> str:
    if TEMPLATE_FILE in tokenizer.files:
        return tokenizer.files[TEMPLATE_FILE].decode()
    found = _settings(tokenizer).get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
    if not isinstance(found, str):
        raise DataError(
            f"{tokenizer.name} brings no chat template: there is neither {TEMPLATE_FILE} beside it nor chat_template "
            f"in its tokenizer_config.json. Name one: {', '.join(BUILT_IN)}, or the path of a file."
        )
    return found


def _names(tokenizer: Tokenizer) -> dict[str, str]:
    """What templates write by name: bos_token, eos_token and so on."""
    by_id = {token.id: name for name, token in control_tokens(tokenizer).items()}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    names = {name: by_id[id] for name, id in ids.items() if id in by_id}
    for name, value in _settings(tokenizer).items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            names[name] = content
    return names


def _settings(tokenizer: Tokenizer) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name in reversed(SETTINGS_FILES):
        merged |= json.loads(tokenizer.files.get(name, b"{}"))
    return merged


def _map_text(value: Any, change: Any) -> Any:
    """A copy in which every text, of keys too, is changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_text(key, change): _map_text(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_text(item, change) for item in value]
    return copy.deepcopy(value)


class _Generation(jinja2.ext.Extension):
    """The block `{% generation %}`: what it writes comes between two marks."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an attribute of instances

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [jinja2.nodes.Name(_MARKS, "load")])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, marks: Marks, caller: Any) -> str:
        return marks.begin + caller() + marks.end


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own would escape characters for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = to_json
    return environment
