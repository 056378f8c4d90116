"""What the tests of titan-ckpt share."""

import uuid
from typing import Any

import pytest

# Heavy, and needed by the first DTensor operation: imported once, here, since a forked rank inherits it.
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401

import ranks  # noqa: F401  # sets one thread, before any operation, so that tests may fork
from s3 import s3, s3_server  # noqa: F401  # fixtures


class Box:
    """The simplest Stateful: a dict, handed out as it is and replaced by what is loaded."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    def state_dict(self) -> dict[str, Any]:
        return self.content

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.content = state_dict


@pytest.fixture(scope="session")
def box() -> type[Box]:
    return Box


@pytest.fixture
def memory() -> str:
    """The URL of a place in memory where nothing is yet."""
    return f"memory://titan/{uuid.uuid4().hex}"


@pytest.fixture(params=["local", "memory", "s3"])
def anywhere(request: pytest.FixtureRequest) -> str:
    """A place of each kind where nothing is yet, as a user types it."""
    if request.param == "local":
        return str(request.getfixturevalue("tmp_path") / "place")
    return request.getfixturevalue(request.param)
