import pytest

from titan_data.errors import DataError
from titan_data.records import text_of
from titan_data.source import Record


def record(**fields):
    return Record(fields, lambda: "a.jsonl, line 7")


def test_a_field_is_the_text():
    assert text_of("body", None)(record(body="x\ny", text="z")) == "x\ny"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{q}\n{a}", "1 + 1?\n2"),
        (r"{q}\n\t{a}", "1 + 1?\n\t2"),
        ("{{{q}}} {{{{", "{1 + 1?} {{"),
        ("{a}{a}", "22"),
        ("Q: {q}", "Q: 1 + 1?"),
    ],
)
def test_a_template_puts_fields_together(template, text):
    assert text_of("text", template)(record(q="1 + 1?", a=2)) == text


def test_braces_in_a_field_are_text():
    assert text_of("text", "{q}!")(record(q="{a}", a="no")) == "{a}!"


@pytest.mark.parametrize("template", ["{q", "q}", "{}", "{q!r}", "{q:>9}", "{0"])
def test_a_template_that_is_none_is_refused(template):
    with pytest.raises(DataError, match=r"data\.template .* cannot be read"):
        text_of("text", template)


def test_a_template_without_fields_is_refused():
    with pytest.raises(DataError, match=r"data\.template 'all the same' names no field"):
        text_of("text", "all the same")


@pytest.mark.parametrize(
    ("template", "fields", "message"),
    [
        (None, {"body": "x"}, r"^a\.jsonl, line 7: no field 'text'; it has 'body'\. .*data\.text_field"),
        (None, {"text": 5}, "field 'text' holds a value of type int, not text"),
        (None, {"text": None}, "field 'text' holds null, not text"),
        ("{q}{a}", {"q": "x"}, "no field 'a'"),
        ("{q}", {"q": None}, "field 'q' holds null"),
        ("{q}", {"q": True}, "field 'q' holds a value of type bool"),
        ("{q}", {"q": ["x"]}, "field 'q' holds a value of type list"),
    ],
)
def test_a_record_without_its_text_is_refused_with_its_place(template, fields, message):
    with pytest.raises(DataError, match=message):
        text_of("text", template)(record(**fields))


def test_the_identity_tells_different_texts_apart():
    forms = [
        ("text", None),
        ("body", None),
        ("text", "{text}"),
        ("text", "{a}{b}"),
        ("text", "{a} {b}"),
        ("x", "{b}{a}"),
    ]
    ways = [text_of(field, template) for field, template in forms]
    identities = [way.identity for way in ways]
    assert identities[0] == identities[2] == "field 'text'"
    assert len(set(identities)) == 5
