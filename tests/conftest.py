"""What many tests stand on: the real base model, the shipped adapters, a real S3 server."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from infra.demo.application import set_up_serve

# Before any library that reads it: nothing is ever fetched from a hub, and Ray reports nothing home.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
set_up_serve()
# numpy's threads spin while they wait; on few cores they take them from everybody else.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

pytest_plugins = ["tests.support.models", "tests.support.seaweed", "tests.support.place"]


@pytest.fixture(scope="module")
def ray_for_jobs() -> Iterator[None]:
    """A Ray of this module's own, with two CPUs."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As the job's tasks compute: the same bytes each time, and no waiting for threads on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
