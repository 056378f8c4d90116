import resource
from contextlib import contextmanager

import pytest


@pytest.fixture
def full_disk():
    """A context in which no file of this process can grow beyond some bytes: writing fails as on a full disk."""

    @contextmanager
    def limit(bytes_left):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit
