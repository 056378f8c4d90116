"""What a user types where a folder is meant: a path, or a URL that fsspec knows (`s3://bucket/run`, `gs://…`)."""

import os
import re
from pathlib import Path
from typing import TypeAlias

from titan_ckpt.errors import CheckpointError
from titan_ckpt.local_place import LocalPlace
from titan_ckpt.place import Place
from titan_ckpt.remote_place import RemotePlace

Location: TypeAlias = str | os.PathLike[str] | Place


def place_of(location: Location) -> Place:
    """The folder that a path or URL names; a `Place` is returned as it is.

    Raises:
        CheckpointError: if a URL has lost a slash on its way through `pathlib`.
    """
    if isinstance(location, Place):
        return location
    text = os.fspath(location)
    if text.startswith("file://"):
        return LocalPlace(Path(text.removeprefix("file://")))
    if "://" in text:
        return RemotePlace(text.rstrip("/"))
    if isinstance(location, os.PathLike) and re.match(r"[a-z][a-z0-9+.-]+:/", text):
        raise CheckpointError(f"{text} was a URL before pathlib dropped a slash; give it as a string, not as a Path.")
    return LocalPlace(Path(text))
