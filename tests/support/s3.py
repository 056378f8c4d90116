"""A real S3 server for tests, as a fixture: import `s3_server`, and `s3`, into a conftest."""

import subprocess
import sys
import uuid
from collections.abc import Iterator

import pytest

# In a process of its own: no thread of it is alive when tests fork, and it outlives writers that tests kill.
_SERVER = """
import boto3, sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="titan")
print(f"http://{host}:{port}", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of a server with a bucket `titan`; the environment leads to it as it does for a user."""
    from s3fs import S3FileSystem

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server = subprocess.Popen(
            [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        with server:
            assert server.stdout is not None
            url = server.stdout.readline().decode().strip()
            patch.setenv("AWS_ENDPOINT_URL", url)
            S3FileSystem.clear_instance_cache()  # which other folders' tests may have led to a server of theirs
            yield url
            server.terminate()


@pytest.fixture
def s3(s3_server: str) -> str:
    """The URL of a place in S3 where nothing is yet."""
    return f"s3://titan/{uuid.uuid4().hex}"
