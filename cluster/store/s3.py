"""An S3 bucket, or a prefix in one, as a store. Open one with ``cluster.store.address.open_store``.

Two layers of bounded retries. botocore's own ("standard" mode) takes connection errors, time-outs and short
throttling, with backoff: an endpoint that does not answer is given up in less than 30 s. Around it, one more
loop takes what botocore leaves: throttling that goes on, connections dropped again and again, bodies cut short
while they are read, and 409 ConditionalRequestConflict, which AWS asks clients to repeat. Of a store that fails
each tenth request in any of these ways, one request in 10^8 is given up at most.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore import exceptions as boto
from botocore.config import Config
from botocore.parsers import ResponseParserError
from botocore.response import StreamingBody
from urllib3.exceptions import HTTPError

from cluster.errors import (
    ConfigError,
    CtsError,
    StoreConflict,
    StoreError,
    StoreForbidden,
    StoreMissing,
    StoreUnreachable,
    StoreUnsafe,
)
from cluster.store.protocol import Blob, Entry, Store, check_key

T = TypeVar("T")

# Worst case of an endpoint that accepts and never answers: 3 x 8 s and at most 1 + 2 s of backoff.
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 8
NUM_ATTEMPTS = 3
NUM_ROUNDS = 4
NUM_ROUNDS_OF_ONE = 8  # where botocore has not tried NUM_ATTEMPTS times in each
PAGE_SIZE = 1000

_NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.TokenRetrievalError,
    boto.SSOError,
)
_NO_CONNECTION = (boto.HTTPClientError, boto.ConnectionError, ResponseParserError)

_SECRET = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_EXPIRED = "renew the credentials and their AWS_SESSION_TOKEN"
_REGION = "set AWS_DEFAULT_REGION to the bucket's region"
_FORBIDDEN = {
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY",
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID, and that it belongs to this endpoint",
    "AccessDenied": "check that these credentials may do this here; a bucket whose requester pays wants "
    "AWS_REQUEST_PAYER=requester",
    "RequestTimeTooSkewed": "set this machine's clock",
    "ExpiredToken": _EXPIRED,
    "InvalidToken": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "AuthorizationHeaderMalformed": _REGION,
}


class _CutShort(Exception):
    """A body ended, or stalled, before all of it was there."""


class S3Store(Store):
    """Raises ConfigError or StoreForbidden at once when AWS's environment variables or files make no client."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket = bucket
        self._base = f"{prefix}/" if prefix else ""
        self._client = _make_client(self.uri)
        self._endpoint = self._client.meta.endpoint_url

    def list(self, prefix: str = "") -> Iterator[Entry]:
        pages = self._client.get_paginator("list_objects_v2")

        def fetch() -> list[Entry]:
            return [
                Entry(item["Key"].removeprefix(self._base), item["Size"], item["ETag"], _seconds(item["LastModified"]))
                for page in pages.paginate(
                    Bucket=self._bucket, Prefix=self._base + prefix, PaginationConfig={"PageSize": PAGE_SIZE}
                )
                for item in page.get("Contents", [])
                if not item["Key"].endswith("/")  # a console's marker of an empty folder
            ]

        # Sorted here: SeaweedFS lists folder by folder, "a/b" before "a-b".
        return iter(sorted(self._call("list", prefix, fetch), key=lambda entry: entry.key))

    def head(self, key: str) -> Entry:
        answer = self._call("head", key, lambda: self._client.head_object(Bucket=self._bucket, Key=self._full(key)))
        return Entry(key, answer["ContentLength"], answer["ETag"], _seconds(answer["LastModified"]))

    def read(self, key: str, *, if_match: str | None = None) -> Blob:
        request = self._get_request(key, if_match)

        def fetch() -> Blob:
            answer = self._client.get_object(**request)
            return Blob(_read_body(answer["Body"]), answer["ETag"])

        return self._call("get", key, fetch)

    def read_range(self, key: str, start: int, length: int, *, if_match: str | None = None) -> bytes:
        assert min(start, length) >= 0, (start, length)
        if length == 0:  # which HTTP cannot ask for
            return b""
        request = self._get_request(key, if_match)
        request["Range"] = f"bytes={start}-{start + length - 1}"

        def fetch() -> bytes:
            answer = self._client.get_object(**request)
            if answer["ContentLength"] != length:
                answer["Body"].close()
                raise StoreConflict(
                    f"{self._where(key)}: {length} bytes from {start} on were expected, the answer has "
                    f"{answer['ContentLength']}; the object is cut short or changed (write it again), or the store "
                    "ignores ranges"
                )
            return _read_body(answer["Body"])

        return self._call("get", key, fetch)

    def write(self, key: str, data: bytes) -> str:
        return self._put(key, data)

    def create(self, key: str, data: bytes) -> str:
        return self._put(key, data, IfNoneMatch="*")

    def replace(self, key: str, data: bytes, *, if_match: str) -> str:
        try:
            return self._put(key, data, IfMatch=if_match)
        except StoreMissing as error:
            # AWS answers 404 NoSuchKey to If-Match on what is gone, others 412. A missing bucket stays missing.
            if _code(error.__cause__) == "NoSuchKey":
                raise StoreConflict(f"{self._where(key)} is gone, expected ETag {if_match}") from error
            raise

    def delete(self, key: str) -> None:
        self._call("delete", key, lambda: self._client.delete_object(Bucket=self._bucket, Key=self._full(key)))

    def _put(self, key: str, data: bytes, **condition: Any) -> str:
        request = {"Bucket": self._bucket, "Key": self._full(key), "Body": data, **condition}
        return self._call("put", key, lambda: str(self._client.put_object(**request)["ETag"]))

    def _get_request(self, key: str, if_match: str | None) -> dict[str, Any]:
        condition = {} if if_match is None else {"IfMatch": if_match}
        return {"Bucket": self._bucket, "Key": self._full(key), **condition}

    def _full(self, key: str) -> str:
        return self._base + check_key(key)

    def _where(self, key: str) -> str:
        return f"{self.uri}/{key} at {self._endpoint}" if key else f"{self.uri} at {self._endpoint}"

    def _call(self, operation: str, key: str, request: Callable[[], T]) -> T:
        for round_index in itertools.count():
            try:
                return request()
            except (boto.ClientError, boto.BotoCoreError, ResponseParserError, _CutShort, OSError) as error:
                if round_index + 1 >= _num_rounds(error):
                    raise self._explain(error, f"{operation} {self._where(key)}") from error
            time.sleep(min(2**round_index, 4) * random.uniform(0.25, 0.5))
        raise AssertionError("unreachable: the last round returns or raises")

    @staticmethod
    def _explain(error: Exception, where: str) -> CtsError:
        """The error of our tree that ``error`` is. Never quotes what could hold a secret."""
        if isinstance(error, boto.ClientError):
            return _explain_answer(error, where)
        if isinstance(error, _NO_CREDENTIALS):
            return StoreForbidden(f"{where}: {_no_credentials(error)}; {_set_credentials()}")
        # A token file, or a credential_process, that is not there. Some of botocore's own errors are OSErrors too.
        if isinstance(error, OSError) and not isinstance(error, boto.BotoCoreError):
            return StoreForbidden(f"{where}: credentials cannot be read ({error}); {_set_credentials()}")
        if isinstance(error, boto.SSLError):
            return StoreUnreachable(
                f"{where}: {error}; set AWS_CA_BUNDLE to the certificate of the authority that signed the store's, or "
                "correct AWS_ENDPOINT_URL"
            )
        if isinstance(error, boto.ParamValidationError):
            return ConfigError(f"{where}: not a request that S3 allows; check bucket and key")
        if type(error) is boto.HTTPClientError:
            # Something odd inside the client. Its text may hold headers, and with them a session token.
            cause = getattr(error, "kwargs", {}).get("error")
            return StoreUnreachable(
                f"{where}: the request could not be sent ({type(cause).__name__}); "
                "look for line breaks in AWS_ACCESS_KEY_ID and AWS_SESSION_TOKEN, and at HTTP_PROXY and HTTPS_PROXY"
            )
        if isinstance(error, ResponseParserError):
            return StoreUnreachable(f"{where}: the answer is not S3's; check AWS_ENDPOINT_URL")
        if isinstance(error, (*_NO_CONNECTION, _CutShort)):
            return StoreUnreachable(
                f"{where}: {error} (tried several times); check AWS_ENDPOINT_URL, the network, and that the store is up"
            )
        return StoreError(f"{where}: {error}; check the AWS_* environment variables")


def _explain_answer(error: boto.ClientError, where: str) -> StoreError:
    code, status = _code(error), _status(error)
    seen = f"{where}: answered {status} {code}: {error.response['Error'].get('Message', 'no message')}"
    if status in (409, 412, 416):
        return StoreConflict(f"{seen}; somebody else wrote it: read it again")
    if code == "NoSuchBucket":
        return StoreMissing(f"{seen}; create the bucket, or check its name and AWS_ENDPOINT_URL")
    if status == 404:
        return StoreMissing(f"{seen}; no such object, or no such bucket: check both names and AWS_ENDPOINT_URL")
    if status in (401, 403) or code in _FORBIDDEN:
        return StoreForbidden(f"{seen}; {_FORBIDDEN.get(code, _SECRET)}")
    if status == 501:
        return StoreUnsafe(f"{seen}; this store lacks what is needed (conditional writes): use another one")
    if _is_passing(error):
        return StoreUnreachable(
            f"{seen} (tried several times); wait, use fewer tasks at once, or check AWS_ENDPOINT_URL"
        )
    if 300 <= status < 400:
        return StoreUnreachable(f"{seen}; {_REGION}, or correct AWS_ENDPOINT_URL")
    return StoreError(f"{seen}; check bucket, key and AWS_ENDPOINT_URL")


def _num_rounds(error: Exception) -> int:
    if isinstance(error, _CutShort) or _code(error) == "ConditionalRequestConflict":
        return NUM_ROUNDS_OF_ONE
    if isinstance(error, boto.ConnectionClosedError) or (isinstance(error, boto.ClientError) and _is_passing(error)):
        return NUM_ROUNDS
    return 1


def _is_passing(error: boto.ClientError) -> bool:
    status = _status(error)
    return status == 429 or (status >= 500 and status != 501) or _code(error) == "ConditionalRequestConflict"


def _code(error: BaseException | None) -> str:
    return str(error.response["Error"].get("Code", "")) if isinstance(error, boto.ClientError) else ""


def _status(error: boto.ClientError) -> int:
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def _seconds(modified: datetime) -> float:
    # A listing has milliseconds, an HTTP header has not: one object, one time.
    return float(int(modified.timestamp()))


def _read_body(body: StreamingBody) -> bytes:
    """All of it. botocore retries requests, but not bodies that break while they are read."""
    with closing(body):
        try:
            data: bytes = body.read()
            return data
        except (boto.HTTPClientError, boto.IncompleteReadError, HTTPError) as error:
            raise _CutShort(f"the body was cut short ({error})") from error


def _no_credentials(error: Exception) -> str:
    # What a credential_process has printed may be anything.
    is_its_own = isinstance(error, boto.CredentialRetrievalError)
    return "credentials could not be retrieved by the configured process or role" if is_its_own else str(error)


def _check_bundle(uri: str) -> None:
    path = os.environ.get("AWS_CA_BUNDLE", "")
    if path and not os.access(path, os.R_OK):
        raise ConfigError(f"{uri}: AWS_CA_BUNDLE is {path!r}, which cannot be read; give a file of certificates")


def _set_credentials() -> str:
    # The node: on a Ray cluster the driver may have them and a worker not.
    where = f"where this runs, on {socket.gethostname()}"
    return f"set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, {where}"


def _let_requester_pay(client: Any) -> None:
    """Where AWS_REQUEST_PAYER says so, as GDAL and others read it; boto3 has no variable for it."""
    payer = os.environ.get("AWS_REQUEST_PAYER", "")
    if payer not in ("", "requester"):
        raise ConfigError(f"AWS_REQUEST_PAYER is {payer!r}; expected requester, or unset it")
    if payer:
        client.meta.events.register("before-sign.s3", _add_payer)


def _add_payer(request: Any, **_: Any) -> None:
    request.headers["x-amz-request-payer"] = "requester"


def _make_client(uri: str) -> Any:
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": NUM_ATTEMPTS},
        max_pool_connections=32,
        # botocore's newer default sends checksums in trailers, which many servers do not understand.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    _check_bundle(uri)
    try:
        core = botocore.session.get_session()
        session = boto3.session.Session(botocore_session=core)
        # botocore reads AWS_DEFAULT_REGION only; every other AWS SDK, and EKS, says AWS_REGION.
        region = session.region_name or os.environ.get("AWS_REGION")
        client = session.client("s3", config=config, region_name=region)
        host = urlsplit(client.meta.endpoint_url).hostname or ""
        chosen = "addressing_style" in core.get_scoped_config().get("s3", {})
        if not host.endswith((".amazonaws.com", ".amazonaws.com.cn")) and not chosen:
            # A server of one's own seldom has a DNS name for every bucket.
            config = config.merge(Config(s3={"addressing_style": "path"}))
            client = session.client("s3", config=config, region_name=region)
    except _NO_CREDENTIALS as error:
        raise StoreForbidden(f"{uri}: {_no_credentials(error)}; {_set_credentials()}") from None
    except (boto.BotoCoreError, ValueError, OSError, AttributeError, TypeError) as error:
        seen = str(error) if isinstance(error, (boto.BotoCoreError, OSError)) else "an invalid endpoint or setting"
        raise ConfigError(f"{uri}: {seen}; correct the AWS_* environment variables or ~/.aws/config") from None
    _let_requester_pay(client)
    endpoint = urlsplit(client.meta.endpoint_url)
    if "@" in endpoint.netloc or endpoint.query:
        raise ConfigError(
            f"{uri}: AWS_ENDPOINT_URL holds more than a host and a path; put credentials into AWS_SECRET_ACCESS_KEY"
        )
    return client
