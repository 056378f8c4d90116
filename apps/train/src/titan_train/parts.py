"""The three parts of a configuration, the fingerprint of the *what*, and differences between two of them."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from titan_train.config import TrainConfig


def part_of(config: TrainConfig, part: str) -> dict[str, Any]:
    """The fields of `config` that belong to `part` (`what`, `how` or `where`), as nested dicts."""
    return _part_of(config, part, "what")


def _part_of(config: Any, part: str, inherited: str) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(config):
        value, own = getattr(config, field.name), field.metadata.get("part", inherited)
        if dataclasses.is_dataclass(value):
            if below := _part_of(value, part, own):
                found[field.name] = below
        elif own == part:
            found[field.name] = value
    return found


def what_of(config: TrainConfig, data_fingerprint: str) -> dict[str, Any]:
    """Everything that the loss curve depends on, as JSON values; data enters by content, not by path."""
    what = part_of(config, "what")
    what["model"]["family"] = f"{type(config.model).__module__}.{type(config.model).__qualname__}"
    what["data"]["fingerprint"] = data_fingerprint
    return json.loads(json.dumps(what, default=dataclasses.asdict))  # tuples hold dataclasses too


def fingerprint(what: Mapping[str, Any]) -> str:
    """A short name for exactly this *what*: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each field that differs: `section.field: before -> now`."""
    flat_before, flat_now = dict(_flat(before)), dict(_flat(now))
    return [
        f"{name}: {flat_before.get(name, 'absent')} -> {flat_now.get(name, 'absent')}"
        for name in sorted(flat_before | flat_now)
        if flat_before.get(name) != flat_now.get(name)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
