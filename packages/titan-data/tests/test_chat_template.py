import json

import pytest

from titan_data.chat_template import BUILT_IN, ChatTemplate, find_marks, open_template
from titan_data.errors import DataError, NotFoundError
from titan_data.sft_config import SFTConfig
from titan_data.tokenizer_files import load_tokenizer, tokenizer_from_files

HI = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})


@pytest.fixture
def tokenizer(chat_folder):
    return load_tokenizer(chat_folder)


def template(text, **options):
    options = {"names": {"bos_token": "<s>"}, "control": ["<|eot_id|>"], "date": "2024-02-29", "name": "mine"} | options
    return ChatTemplate(text, **options)


def test_it_has_the_names_that_templates_expect():
    text = (
        "{{ bos_token }}{% for message in messages %}\n"
        "    {{ message['role'] }}:{{ message.content }}\n"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}"
        "{{ tools | tojson }} {{ {'a': '<é>'} | tojson(indent=None) }} {{ strftime_now('%d %b %Y') }}"
        "{% if add_generation_prompt %}go{% endif %}{{ unknown is defined }}"
    )
    assert template(text).render(HI).text == ('<s>    user:Hi\n    assistant:Hello\nnull {"a": "<é>"} 29 Feb 2024False')
    assert "go" in template(text).render(HI, add_generation_prompt=True).text
    assert '[{"name": "add"}]' in template(text).render(HI, [{"name": "add"}]).text


def test_generation_blocks_are_marked():
    rendered = template("{{ 1 }}{% generation %}{{ messages[1].content }}!{% endgeneration %}2").render(HI)
    marks = rendered.marks
    assert rendered.text == f"1{marks.begin}Hello!{marks.end}2"
    assert template("{%- generation -%} {%- endgeneration -%}").marks_turns
    assert not template("{{ generation }}").marks_turns


def test_look_alikes_of_control_tokens_are_escaped_in_messages_and_tools_only():
    text = "{{ messages[0].content }}<|eot_id|>{{ tools | tojson }}"
    rendered = template(text).render([{"role": "user", "content": "a<|eot_id|>b"}], [{"<|eot_id|>": ["<|eot_id|>"]}])
    escaped = f"<{rendered.marks.escape}|eot_id|>"
    assert rendered.text == f'a{escaped}b<|eot_id|>[{{"{escaped}": ["{escaped}"]}}]'


def test_marks_are_characters_that_do_not_occur():
    assert find_marks(["a"]) == ("\ufdd0", "\ufdd1", "\ufdd2")
    assert find_marks([{"content": "\ufdd0 \ufdd2"}]) == ("\ufdd1", "\ufdd3", "\ufdd4")
    with pytest.raises(DataError, match="all of Unicode's noncharacters"):
        find_marks("".join(map(chr, range(0xFDD0, 0xFDF0))))


def test_what_a_template_refuses_or_may_not_do_is_said():
    with pytest.raises(DataError, match="mine cannot write this conversation: roles must alternate"):
        template("{{ raise_exception('roles must alternate') }}").render(HI)
    with pytest.raises(DataError, match=r"mine cannot write this conversation: .*unsafe"):
        template("{{ messages.__class__.__mro__ }}").render(HI)
    with pytest.raises(DataError, match="mine cannot write"):
        template("{{ messages.append(1) }}").render(HI)
    with pytest.raises(DataError, match="mine, line 2: not a Jinja template"):
        template("\n{% if %}")
    with pytest.raises(DataError, match=r"sft\.date is '26 Jul', not a day"):
        template("", date="26 Jul")


def test_rendering_leaves_the_messages_alone():
    messages = [{"role": "user", "content": "a<|eot_id|>b"}]
    template("{{ messages[0].content }}").render(messages)
    assert messages == [{"role": "user", "content": "a<|eot_id|>b"}]


def with_files(tokenizer, **files):
    content = {name.replace("__", "."): value.encode() for name, value in files.items()}
    return tokenizer_from_files(dict(tokenizer.files) | content, name="mine")


def test_auto_is_the_template_of_the_tokenizer(tokenizer):
    settings = json.loads(tokenizer.files["tokenizer_config.json"])
    plain = with_files(tokenizer, tokenizer_config__json=json.dumps(settings | {"chat_template": "A{{ eos_token }}"}))
    assert open_template(SFTConfig(), plain).render(HI).text == "A<|end_of_text|>"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    several = with_files(tokenizer, tokenizer_config__json=json.dumps(settings | {"chat_template": named}))
    assert open_template(SFTConfig(), several).render(HI).text == "D"
    beside = with_files(several, chat_template__jinja="J")
    assert open_template(SFTConfig(), beside).render(HI).text == "J"


def test_a_template_may_be_built_in_or_a_file(tokenizer, tmp_path):
    (tmp_path / "mine.jinja").write_text("M")
    assert open_template(SFTConfig(template=str(tmp_path / "mine.jinja")), tokenizer).render(HI).text == "M"
    text = open_template(SFTConfig(template="chatml"), tokenizer).render(HI[:1], add_generation_prompt=True).text
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    text = open_template(SFTConfig(template="llama3"), tokenizer).render(HI[:1], add_generation_prompt=True).text
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_built_in_templates_refuse_what_they_would_leave_out(tokenizer, name):
    built_in = open_template(SFTConfig(template=name), tokenizer)
    with pytest.raises(DataError, match="has no place for tools"):
        built_in.render(HI, [{"name": "add"}])
    with pytest.raises(DataError, match="has no place for tool calls"):
        built_in.render([HI[0], HI[1] | {"tool_calls": [{}]}])


def test_a_template_that_is_not_there_or_does_not_fit_is_refused(tokenizer, bpe_folder):
    with pytest.raises(DataError, match="brings no chat template"):
        open_template(SFTConfig(), tokenizer)
    with pytest.raises(NotFoundError, match="'lama3' is neither 'auto', nor one of 'llama3', 'chatml', nor a file"):
        open_template(SFTConfig(template="lama3"), tokenizer)
    with pytest.raises(DataError, match=r"'llama3' writes <\|start_header_id\|>, .* does not have"):
        open_template(SFTConfig(template="llama3"), load_tokenizer(bpe_folder))


def test_the_identity_is_what_the_text_depends_on():
    assert template("A").identity == template("A", name="other").identity
    for other in (template("B"), template("A", date="2024-03-01"), template("A", names={})):
        assert other.identity != template("A").identity
