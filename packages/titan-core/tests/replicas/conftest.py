"""Fixtures of replica groups: a Lighthouse, and processes that end with the test."""

from replica_processes import address, start  # noqa: F401
