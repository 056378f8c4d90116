"""Errors for data that cannot be used as it is."""

import contextlib
import importlib
from collections.abc import Generator
from types import ModuleType


class DataError(ValueError):
    """A corpus, a tokenizer or a cache cannot be used; the message names the place, the reason and the remedy."""


class NotFoundError(DataError, FileNotFoundError):
    """A corpus or a tokenizer is not where the configuration says; the message names the place."""


class ReadingError(RuntimeError):
    """A batch does not come: what reads it hangs or has died; the message says where."""


class MissingPackageError(DataError, ImportError):
    """What was asked for takes a package that is not installed; the message names the extra that brings it."""


@contextlib.contextmanager
def about(what: str) -> Generator[None]:
    """Puts the name of what is being read before the message of any `DataError`: "validation.sets news: ..."."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"{what}: {error}") from error


def import_extra(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Imports a module that only an extra of this package brings.

    Args:
        module: e.g. "pyarrow.parquet".
        extra: the name of the extra.
        purpose: what needs it, as the beginning of a sentence: "reading Parquet files".

    Raises:
        MissingPackageError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingPackageError(
            f"{purpose} takes the package {package}, which cannot be imported ({error}). Install it with "
            f"pip install 'titan-data[{extra}]'."
        ) from error
