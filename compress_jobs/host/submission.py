"""Jobs that ``ray job submit`` has sent: they run on a node of the Ray cluster, in a copy of the working folder that
Ray keeps in a cache. What is written there nobody finds again."""

from __future__ import annotations

import os

from cluster.errors import ConfigError
from cluster.store.address import local_path


def is_submitted() -> bool:
    # What Ray's job supervisor hands its driver; the tests submit a job for real.
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def is_relative(address: str) -> bool:
    path = local_path(address)
    return path is not None and not os.path.isabs(os.path.expanduser(path))


def check_place(option: str, address: str, written: bool = False) -> None:
    """Raises ConfigError in a submitted job where ``address`` is a relative path, or where it is to be ``written`` and
    neither it nor the folder above it is on this node: then it was meant for another machine."""
    if not is_submitted() or (path := local_path(address)) is None:
        return
    if is_relative(address):
        raise ConfigError(
            f"{option} {address}: a relative path, but a job that was submitted runs in a copy of its working folder; "
            "give s3://bucket/prefix, or the absolute path of a folder that all nodes share"
        )
    if written and not os.path.isdir(os.path.dirname(os.path.abspath(os.path.expanduser(path)))):
        raise ConfigError(
            f"{option} {address}: neither it nor the folder above it is on the node that runs this submitted job; "
            "give s3://bucket/prefix, or a folder that all nodes share"
        )
