"""The text of a record: one of its fields, or several put together by a template."""

import string
from collections.abc import Iterator
from dataclasses import dataclass

from titan_data.errors import DataError
from titan_data.pieces import pieces_of
from titan_data.source import Piece, Record


@dataclass(frozen=True)
class TextOf:
    """How a record becomes a document.

    Made by `text_of`. `literals` has one more entry than `fields`, and stands around them.
    """

    fields: tuple[str, ...]
    literals: tuple[str, ...]

    @property
    def identity(self) -> str:
        """Enters the fingerprint: equal if and only if the same records give the same documents."""
        if self.literals == ("", ""):
            return f"field {self.fields[0]!r}"
        return f"template {self.literals!r} {self.fields!r}"

    def __call__(self, record: Record) -> str:
        """Returns the text of one record.

        Raises:
            DataError: for a missing field, or one that holds something else than text (a template takes numbers too).
        """
        if self.literals == ("", ""):
            return _field(record, self.fields[0])
        parts = [self.literals[0]]
        for field, literal in zip(self.fields, self.literals[1:], strict=True):
            parts += (_field(record, field, numbers=True), literal)
        return "".join(parts)

    def pieces(self, record: Record) -> Iterator[Piece]:
        """Yields the document in pieces of bounded size."""
        return pieces_of(self(record))


def text_of(field: str, template: str | None) -> TextOf:
    r"""Returns how a record's text is found.

    Args:
        field: the field that holds the text; not used if there is a template.
        template: text with fields in braces, "{question}\n{answer}"; "{{" and "}}" stand for braces, and a backslash
            with n or t after it for a line break or tab, since shells don't have these.

    Raises:
        DataError: for a template that is none, or has no fields.
    """
    if template is None:
        return TextOf((field,), ("", ""))
    fields, literals = [], [""]
    try:
        for literal, name, form, conversion in string.Formatter().parse(template):
            literals[-1] += literal.replace("\\n", "\n").replace("\\t", "\t")
            if name is None:
                continue
            if not name or form or conversion:
                raise ValueError(f"{{{name}}} is not the plain name of a field")
            fields.append(name)
            literals.append("")
    except ValueError as error:
        raise DataError(
            f"data.template {template!r} cannot be read: {error}. Write fields as {{name}}, and braces that are text "
            "twice: {{ and }}."
        ) from error
    if not fields:
        raise DataError(f"data.template {template!r} names no field, so that all documents would be equal.")
    return TextOf(tuple(fields), tuple(literals))


def _field(record: Record, field: str, *, numbers: bool = False) -> str:
    if field not in record.fields:
        raise DataError(
            f"{record.place}: no field {field!r}; it has {', '.join(map(repr, record.fields)) or 'no fields'}. "
            "Name the field that holds the text with data.text_field, or several with data.template."
        )
    value = record.fields[field]
    if isinstance(value, str):
        return value
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{record.place}: field {field!r} holds {_kind(value)}, not text.")


def _kind(value: object) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"
