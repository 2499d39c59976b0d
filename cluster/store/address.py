"""From an address to a store: ``s3://bucket[/prefix]``, a local path, or ``file:///path``."""

from __future__ import annotations

import re
from os.path import abspath, expanduser
from urllib.parse import unquote

from cluster.errors import ConfigError
from cluster.store.local import LocalStore
from cluster.store.protocol import Store, check_key

_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


def open_store(uri: str) -> Store:
    """A store over ``s3://bucket[/prefix]``, a local path, or ``file:///path``. Asks nothing of the store yet.

    S3 takes credentials, region and endpoint from boto3's own environment (AWS_ENDPOINT_URL for a server
    that is not AWS). Raises ConfigError for anything else.
    """
    match = _SCHEME.fullmatch(uri)
    if match is None:
        return LocalStore(_local_path(uri, uri))
    scheme, rest = match["scheme"].lower(), match["rest"]
    if scheme == "file":
        host, _, path = rest.partition("/")
        if host not in ("", "localhost"):
            raise ConfigError(f"{uri!r}: a file URI names no host; write file:///path or a plain path")
        return LocalStore(_local_path("/" + unquote(path), uri))
    if scheme == "s3":
        # Here, for boto3 is slow to import and often not needed.
        from cluster.store.s3 import S3Store

        return S3Store(*_bucket_and_prefix(rest))
    raise ConfigError(f"a store of scheme {scheme!r}; expected s3://bucket/prefix, a local path, or file:///path")


def _local_path(path: str, uri: str) -> str:
    if not path.strip() or "\0" in path:
        raise ConfigError(f"{uri!r} is no path; expected s3://bucket/prefix, a local path, or file:///path")
    return abspath(expanduser(path))


def _bucket_and_prefix(rest: str) -> tuple[str, str]:
    bucket, _, prefix = rest.partition("/")
    if _BUCKET.fullmatch(bucket) is None:
        # Not echoed: s3://key:secret@bucket is a mistake people make.
        raise ConfigError(
            "an S3 URI whose bucket is not a bucket name; expected s3://bucket/prefix, with credentials and "
            "endpoint in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)"
        )
    prefix = prefix.rstrip("/")
    return bucket, check_key(prefix) if prefix else ""
