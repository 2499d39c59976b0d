"""Jobs that ``ray job submit`` has sent: they run on a node of the Ray cluster, in a copy of the working folder that
Ray keeps in a cache. What is written there nobody finds again."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.errors import ConfigError
from cluster.store.address import local_path

# What Ray's job supervisor hands its driver; the tests submit a job for real.
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def is_submitted() -> bool:
    return SUBMITTED in os.environ


def is_relative(address: str) -> bool:
    path = local_path(address)
    return path is not None and not os.path.isabs(os.path.expanduser(path))


def local_file(option: str, text: str) -> Path:
    """The path that ``option`` of a command is to write here, ``~`` and file:// taken for what they mean. Raises
    ConfigError for s3://, for what begins like a URI and is none, and as ``check_place`` does."""
    path = local_path(text)
    if path is None:
        raise ConfigError(f"{option} {text}: it writes on this machine; give a local path, and upload it from there")
    check_place(option, text, where="the absolute path of a folder that is kept")
    return Path(path).expanduser()


def check_place(
    option: str,
    address: str,
    where: str = "s3://bucket/prefix, or the absolute path of a folder that all nodes share",
) -> None:
    """For what is to be written. Raises ConfigError in a submitted job where ``address`` is a relative path, or where
    neither it nor the folder above it is on this node: then it was meant for another machine."""
    if not is_submitted() or (path := local_path(address)) is None:
        return
    if is_relative(address):
        raise ConfigError(
            f"{option} {address}: a relative path, but a job that was submitted runs in a copy of its working folder; "
            f"give {where}"
        )
    if not os.path.isdir(os.path.dirname(os.path.abspath(os.path.expanduser(path)))):
        raise ConfigError(
            f"{option} {address}: neither it nor the folder above it is on the node that runs this submitted job; "
            f"give {where}"
        )
