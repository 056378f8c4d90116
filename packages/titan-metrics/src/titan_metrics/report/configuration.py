"""Configurations and environments as flat tables, and what differs between runs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """A setting and each run's value of it; None where the run has no such setting."""

    name: str
    values: list[str | None]

    @property
    def differs(self) -> bool:
        """Whether the runs disagree."""
        return len(set(self.values)) > 1


def flat(value: Any, name: str = "") -> dict[str, str]:
    """Nested objects as `outer.inner` -> JSON text; lists stay whole, and a class is named without its module."""
    if not isinstance(value, Mapping):
        return {name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}
    if not value and name:
        return {name: "{}"}
    rows = {}
    for key, inner in value.items():
        if key == "type" and isinstance(inner, str) and ":" in inner:
            inner = inner.rpartition(":")[2]
        rows |= flat(inner, f"{name}.{key}" if name else key)
    return rows


def rows(values: Sequence[Mapping[str, Any] | None]) -> list[Row]:
    """One row a setting that any run has, in the order of the first run that has it."""
    tables = [flat(value) if value else {} for value in values]
    names = dict.fromkeys(name for table in tables for name in table)
    return [Row(name, [table.get(name) for table in tables]) for name in names]


def by_section(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows under the first part of their names; those without a dot come first, under an empty name."""
    sections: dict[str, list[Row]] = {"": []}
    for row in rows:
        section, dot, _ = row.name.partition(".")
        sections.setdefault(section if dot else "", []).append(row)
    return {name: found for name, found in sections.items() if found}
