"""A configuration as JSON and back: `config.json` in a run directory starts the same run again."""

import dataclasses
import difflib
import importlib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_train.config import TrainConfig

RUN_CONFIG = "train_config.json"
"""Its name among the files of a checkpoint."""

_TYPE = "type"


class ConfigFileError(ValueError):
    """A configuration file cannot be read; the message names the file and the field."""


def to_json(config: Any) -> str:
    """`config` as indented JSON, in which each dataclass carries its import path."""
    return json.dumps(_encode(config), indent=2) + "\n"


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        return {_TYPE: kind} | {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _encode(item) for name, item in value.items()}
    return [_encode(item) for item in value] if isinstance(value, tuple) else value


def read_config(path: Path) -> TrainConfig:
    """The configuration in the JSON file at `path`; fields it leaves out have their defaults.

    Raises:
        ConfigFileError: if the file is missing, is not such JSON, or holds an unknown field or a wrong type.
    """
    try:
        values = json.loads(path.read_text(), object_pairs_hook=_object)
    except OSError as error:
        raise ConfigFileError(f"Cannot read the configuration file {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigFileError(f"{path} is not JSON: {error}. Expected a config.json that a run wrote.") from error
    config = _decode(TrainConfig, values, str(path))
    if not isinstance(config, TrainConfig):
        raise ConfigFileError(f"{path} holds a {type(config).__name__}, not a TrainConfig.")
    return config


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is given twice")
        found[name] = value
    return found


def _decode(annotation: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(annotation) or (isinstance(value, dict) and _TYPE in value):
        return _decode_dataclass(annotation, value, where)
    options = _options(annotation)
    if isinstance(value, list):
        (item,) = [typing.get_args(o)[0] for o in options if typing.get_origin(o) is tuple] or [None]
        if item is not None:
            return tuple(_decode(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if isinstance(value, dict):
        (item,) = [typing.get_args(o)[1] for o in options if typing.get_origin(o) is Mapping] or [None]
        if item is not None:
            return {name: _decode(item, v, f"{where}.{name}") for name, v in value.items()}
    for option in options:
        if option is float and type(value) in (int, float):
            return float(value)
        if (isinstance(option, type) and type(value) is option) or option == value:
            return value
    expected = " or ".join(getattr(o, "__name__", repr(o)) for o in options)
    raise ConfigFileError(f"{where} is {value!r}; expected {expected}.")


def _options(annotation: Any) -> list[Any]:
    """The types and literal values that an annotation admits."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Literal):
        return [option for arg in typing.get_args(annotation) for option in _options(arg)]
    return [annotation]


def _decode_dataclass(annotation: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigFileError(f"{where} is {value!r}; expected an object with fields.")
    kind = _import_dataclass(value[_TYPE], where) if _TYPE in value else annotation
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    arguments = {}
    for name, item in value.items():
        if name == _TYPE:
            continue
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f" Did you mean {close[0]!r}?" if close else f" It has {', '.join(names)}."
            raise ConfigFileError(f"{where}: {kind.__name__} has no field {name!r}.{hint}")
        arguments[name] = _decode(hints[name], item, f"{where}: {name}")
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ConfigFileError(f"{where}: {error}.") from error


def _import_dataclass(path: str, where: str) -> type:
    module, _, name = str(path).partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigFileError(
            f"{where} needs {path}, which cannot be imported ({error}); install or add to PYTHONPATH what defines it."
        ) from error
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ConfigFileError(f"{where}: {path} is not a dataclass.")
    return kind
