"""From an address to a store: ``s3://bucket[/prefix]``, a local path, or ``file:///path``."""

from __future__ import annotations

import re
from os.path import abspath, expanduser
from urllib.parse import unquote

from cluster.errors import ConfigError
from cluster.store.local import LocalStore
from cluster.store.protocol import Store, check_key

_LOCAL = "a local path, or file:///path"
# A scheme with something missing, as in s3:/bucket, s3:bucket and s3//bucket.
_MISSPELT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:|(s3|s3a|s3n|gs|file|https?)//", re.IGNORECASE)
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


def open_store(uri: str) -> Store:
    """A store over ``s3://bucket[/prefix]``, a local path, or ``file:///path``. Asks nothing of the store yet.

    S3 takes credentials, region and endpoint from boto3's own environment (AWS_ENDPOINT_URL for a server
    that is not AWS). Raises ConfigError for anything else.
    """
    if (path := local_path(uri)) is not None:
        return LocalStore(abspath(expanduser(path)))
    # Here, for boto3 is slow to import and often not needed.
    from cluster.store.s3 import S3Store

    return S3Store(*_bucket_and_prefix(uri.partition("://")[2]))


def local_path(uri: str) -> str | None:
    """The path as it was written, where ``uri`` names a local one; None where it is s3://. Raises ConfigError for
    anything else."""
    match = _SCHEME.fullmatch(uri)
    if match is None:
        if not uri.strip() or "\0" in uri:
            raise ConfigError(f"{uri!r} is no path; expected s3://bucket/prefix, {_LOCAL}")
        if uri != uri.strip() or uri[0] in "\"'" or expanduser(uri).startswith("~"):
            raise ConfigError(
                f"{uri!r}: spaces or quotes around it, or no such user; expected s3://bucket/prefix, {_LOCAL}"
            )
        if _MISSPELT.match(uri) or "://" in uri:
            raise ConfigError(
                f"{uri!r} begins like a URI and is none; expected s3://bucket/prefix or file:///path (./ before a "
                "local path that begins so)"
            )
        return uri
    scheme, rest = match["scheme"].lower(), match["rest"]
    if uri != uri.strip():
        raise ConfigError(f"an address of scheme {scheme!r} that ends in a space or a line break; take it away")
    if scheme == "s3":
        return None
    if scheme == "file":
        host, _, path = rest.partition("/")
        if host not in ("", "localhost"):
            raise ConfigError(f"{uri!r}: a file URI names no host; write file:///path or a plain path")
        if not path or "\0" in unquote(path):
            raise ConfigError(f"{uri!r} is no path; expected s3://bucket/prefix, {_LOCAL}")
        return "/" + unquote(path)
    raise ConfigError(f"a store of scheme {scheme!r}; expected s3://bucket/prefix, {_LOCAL}")


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
