"""A small corpus, and a cache that all tests of a session share."""

import importlib
import os
import random

import pytest

# Whatever a rank imports after the fork, each would import for itself; so all of it is imported here.
import ranks  # noqa: F401  (sets one thread before any operation, so that ranks may be forked)
import training_runs
from replica_processes import address, start  # noqa: F401  (fixtures)
from s3 import s3_server  # noqa: F401  (a fixture)

for _module in (
    "torch.distributed.checkpoint",
    "torch.nn.attention.flex_attention",
    *map("titan_core.{}".format, ("context", "expert", "fsdp", "pipelining.pipeline", "tensor")),
    *map("titan_models.{}".format, ("decoder", "moe")),
):
    importlib.import_module(_module)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    os.environ["TITAN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("COLUMNS", None)  # tests that run side by side are told of a narrow terminal


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Some forty short documents of words, seeded."""
    folder = tmp_path_factory.mktemp("corpus")
    words = random.Random(0)
    vocabulary = ["".join(words.choices("abcdefghij", k=words.randint(1, 6))) for _ in range(120)]
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(" ".join(words.choices(vocabulary, k=words.randint(5, 400))))
    return folder


@pytest.fixture
def tiny(corpus):
    """A run of 20 steps that takes a second."""
    return training_runs.change(training_runs.TINY, **{"data.source": str(corpus)})
