"""A model's configuration as `model.json`, which travels with its weights: whoever has both needs no preset.

Fields that are no part of the model but of how it is computed (metadata "part" is "how") are not carried. The form is
that of a run's `config.json`: each dataclass names its import path, so that families from elsewhere work too.
"""

import dataclasses
import importlib
import json
import types
import typing
from collections.abc import Collection, Iterator
from typing import Any

from titan_models.config import DecoderConfig
from titan_models.shape import ModelConfigError

MODEL_FILE = "model.json"
_TYPE = "type"


def to_json(config: DecoderConfig) -> str:
    """`config` as indented JSON."""
    return json.dumps(_encoded(config), indent=2) + "\n"


def from_json(text: str | bytes) -> DecoderConfig:
    """The configuration that `to_json` was given; fields that it lacks have their defaults.

    Raises:
        ModelConfigError: if it is no such JSON, names what cannot be imported, or has an unknown field or a wrong type.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ModelConfigError(f"{MODEL_FILE} is not JSON: {error}.") from error
    config = _decoded(values, "model")
    if not isinstance(config, DecoderConfig):
        raise ModelConfigError(
            f"{MODEL_FILE} holds a {type(config).__name__}, and the configuration of a model is wanted."
        )
    return config


def differences(one: DecoderConfig, other: DecoderConfig, unsaid: Collection[str] = ()) -> list[str]:
    """The fields in which two models differ, each as `moe.top_k: 2 and 4`; the same ones that `to_json` carries.

    Args:
        one: a configuration.
        other: another one.
        unsaid: fields to pass over, since the format that one of the two came from has no place for them.
    """
    return [f"{name}: {values}" for name, values in _compared(_encoded(one), _encoded(other), "") if name not in unsaid]


def _compared(one: Any, other: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(one, dict) and isinstance(other, dict):
        for name in dict.fromkeys([*one, *other]):
            yield from _compared(one.get(name, "not set"), other.get(name, "not set"), f"{where}.{name}".lstrip("."))
    elif one != other:
        yield where, f"{_shown(one)} and {_shown(other)}"


def _shown(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return f"({', '.join(f'{name} {_shown(item)}' for name, item in value.items() if name != _TYPE)})"


def _encoded(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return value
    kind = f"{type(value).__module__}:{type(value).__qualname__}"
    fields = [field for field in dataclasses.fields(value) if field.metadata.get("part") != "how"]
    return {_TYPE: kind} | {field.name: _encoded(getattr(value, field.name)) for field in fields}


def _decoded(value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        return value
    kind = _dataclass(str(value.get(_TYPE)), where)
    hints = typing.get_type_hints(kind)
    fields = {name: item for name, item in value.items() if name != _TYPE}
    if unknown := fields.keys() - {field.name for field in dataclasses.fields(kind)}:
        raise ModelConfigError(
            f"{where} in {MODEL_FILE} has fields that {kind.__name__} doesn't know: {', '.join(sorted(unknown))}. "
            "Another version of its family has written it."
        )
    arguments = {name: _decoded(item, f"{where}.{name}") for name, item in fields.items()}
    for name, item in arguments.items():
        if not _admits(hints[name], item):
            raise ModelConfigError(f"{where}.{name} in {MODEL_FILE} is {item!r}, which {kind.__name__} doesn't take.")
    return kind(**arguments)


def _admits(annotation: Any, value: Any) -> bool:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(_admits(option, value) for option in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Literal:
        return value in typing.get_args(annotation)
    if annotation is float:
        return type(value) in (int, float)
    return isinstance(value, annotation) and (type(value) is not bool or annotation is bool)


def _dataclass(path: str, where: str) -> type[Any]:
    module, _, name = path.partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelConfigError(
            f"{where} in {MODEL_FILE} needs {path}, which cannot be imported ({error}); install or add to PYTHONPATH "
            "what defines it."
        ) from error
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ModelConfigError(f"{where} in {MODEL_FILE} needs {path}, which is no dataclass.")
    return kind
