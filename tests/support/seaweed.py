"""Fixtures of a real S3 server (``infra/seaweed.py``)."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest

from infra.seaweed import AMBIENT, BUCKET, S3Server, run_seaweed


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One SeaweedFS for the whole session."""
    with run_seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """``s3://bucket/prefix`` with nothing in it yet, and the environment that leads there.

    A prefix, not a bucket: SeaweedFS lays out volumes for each bucket, and a small disk has few.
    """
    for name in AMBIENT:
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid4().hex}"
