"""Finds the function that returns a configuration: `--module llama3 --config llama3_8b`.

`--module` is a module of `titan_train.configs`, any importable module, or a path to a `.py` file; `--config` is the
name of a function in it that takes nothing and returns a `TrainConfig`, or a path to a `config.json` of a run.
"""

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import titan_train.configs
from titan_train.config import TrainConfig
from titan_train.config_file import read_config

DEFAULT_MODULE = "llama3"
DEFAULT_CONFIG = "llama3_debug"


class RegistryError(ValueError):
    """No such module or configuration; the message lists what there is."""


def load_config(module: str, config: str) -> TrainConfig:
    """The configuration that `--module` and `--config` name.

    Raises:
        RegistryError: if the module or the function does not exist, the function returns something else, or a file has
            the name of another module.
        ConfigFileError: if `config` is a JSON file that cannot be read.
    """
    if config.endswith(".json"):
        return read_config(Path(config))
    if Path(config, "config.json").is_file():
        raise RegistryError(f"--config {config} is a run directory; give {Path(config, 'config.json')} or --output.")
    namespace = _load_module(module)
    functions = config_functions(namespace)
    if config not in functions:
        close = difflib.get_close_matches(config, functions, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise RegistryError(
            f"Module {module!r} has no configuration {config!r}.{hint} It has: {', '.join(functions) or 'none'}."
        )
    made = getattr(namespace, config)()
    if not isinstance(made, TrainConfig):
        raise RegistryError(f"{module}.{config}() returned a {type(made).__name__}; expected a TrainConfig.")
    return made


def config_functions(module: ModuleType) -> list[str]:
    """Names of the module's own public functions that take no argument, in the order of their definition."""
    return [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and not inspect.signature(value).parameters
    ]


def builtin_modules() -> list[str]:
    """Names of the modules in `titan_train.configs`."""
    return [info.name for info in pkgutil.iter_modules(titan_train.configs.__path__)]


def _load_module(name: str) -> ModuleType:
    if name in builtin_modules():
        return importlib.import_module(f"titan_train.configs.{name}")
    if name.endswith(".py"):
        return _load_file(Path(name))
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a module beside the user, as with `python -m`
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        close = difflib.get_close_matches(name, builtin_modules(), 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise RegistryError(
            f"--module {name!r} is not a module that Python finds.{hint} Built in: {', '.join(builtin_modules())}; "
            "else give an importable module or a path to a .py file."
        ) from error


def _load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise RegistryError(f"--module {path} does not exist or is not a Python file.")
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != path.resolve().parent]
    other = PathFinder.find_spec(path.stem, elsewhere)
    if path.stem in sys.stdlib_module_names or (other and other.origin):
        raise RegistryError(
            f"--module {path} has the name of another module, {path.stem}, which it would hide from all that imports "
            "it. Rename the file."
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that config.json can name a dataclass the file defines
    spec.loader.exec_module(module)
    return module
