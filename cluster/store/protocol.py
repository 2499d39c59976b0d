"""One small interface over an object store or a folder.

    store = open_store("s3://bucket/prefix")                # or a local path: address.py
    etag = store.create("objects/ab.safetensors", data)     # StoreConflict if it is already there
    store.replace("CURRENT", data, if_match=etag)           # StoreConflict if it is no longer the one seen

A key is relative to the store's ``uri``: plain segments joined by "/". An ETag is opaque: compare it for
equality, or hand it back. A store may be shared by threads. Nothing half-written is ever visible.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from uuid import uuid4

from cluster.errors import ConfigError, StoreConflict, StoreError, StoreUnreachable, StoreUnsafe

OWN_FILES = ".cts-"
"""Names that begin so are a store's own (temporary and lock files): never a key, never listed."""


@dataclass(frozen=True)
class Entry:
    """An object without its content. ``key`` is relative to the store's uri.

    ``modified_s``: when it was last written, in Unix seconds by the store's clock. S3 tells whole seconds only
    (rounded down, so that ``list`` and ``head`` agree); in a folder the writer's host stamps its files.
    """

    key: str
    size_bytes: int
    etag: str
    modified_s: float


@dataclass(frozen=True)
class Blob:
    """An object's content, and the ETag it had when it was read."""

    data: bytes
    etag: str


class Store(ABC):
    """``uri`` is normalised: ``s3://bucket/prefix`` or an absolute local path, no trailing slash.

    Every method may raise StoreForbidden, StoreUnreachable (after bounded retries) and, for a key that is
    not plain segments, ConfigError.
    """

    uri: str

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Every object whose key starts with the string ``prefix``, in ascending order of code points.

        The whole listing is fetched, page by page, before this returns. Raises StoreMissing when the bucket
        or the folder is not there; a prefix that nothing starts with yields nothing.
        """

    @abstractmethod
    def head(self, key: str) -> Entry:
        """Raises StoreMissing."""

    @abstractmethod
    def read(self, key: str, *, if_match: str | None = None) -> Blob:
        """The whole object. Raises StoreMissing, and StoreConflict when its ETag is not ``if_match``."""

    @abstractmethod
    def read_range(self, key: str, start: int, length: int, *, if_match: str | None = None) -> bytes:
        """Exactly ``length`` bytes from ``start`` on. Raises as ``read`` does; StoreConflict too when the
        object ends before them. What a too large ``length`` asks for is never allocated."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> str:
        """Creates or replaces, whatever is there; returns the ETag."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> str:
        """Returns the ETag. Raises StoreConflict when there is such an object already.

        It may be this very call's: an answer got lost and the retry met the first try's object. Whoever must
        know puts a token of its own into ``data`` and reads it back. The same holds for ``replace``.
        """

    @abstractmethod
    def replace(self, key: str, data: bytes, *, if_match: str) -> str:
        """Returns the new ETag. Raises StoreConflict when the object is gone or its ETag is not ``if_match``."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Does nothing when there is no such object."""

    def clock_s(self) -> float:
        """What time it is for the store: ``modified_s`` of an object written for it under ``work/``, and removed.

        Ages come from this clock alone; that of the machine asking may be hours off.
        """
        key = f"work/clock-{uuid4().hex}"
        try:
            self.write(key, b"")
            return self.head(key).modified_s
        finally:
            self.delete(key)

    def check_conditional_writes(self) -> None:
        """Tries ``create`` and ``replace`` on an object of its own under ``work/``, which it removes again.

        Raises StoreUnsafe when the store lets a write through that should have failed: some servers that
        speak S3 ignore If-None-Match and If-Match without a word.
        """
        key = f"work/probe-{uuid4().hex}"
        try:
            fault = self._find_fault(key)
        except StoreUnreachable:
            raise  # waited for long enough already, and it would not delete either
        except StoreError:
            with suppress(StoreError):
                self.delete(key)
            raise
        self.delete(key)
        if fault is not None:
            raise StoreUnsafe(
                f"{self.uri}: the store {fault}, so two jobs could overwrite each other unnoticed; "
                "use a store with conditional writes (AWS S3, MinIO, SeaweedFS, Ceph, a local folder)"
            )

    def _find_fault(self, key: str) -> str | None:
        first = self._write_own(key, b"first", lambda: self.create(key, b"first"))
        if not _conflicts(lambda: self.create(key, b"second")):
            return "ignores create-only writes (If-None-Match: *)"
        try:
            self._write_own(key, b"third", lambda: self.replace(key, b"third", if_match=first))
        except StoreConflict:
            return "refuses to replace an unchanged object (If-Match)"
        if not _conflicts(lambda: self.replace(key, b"fourth", if_match=first)):
            return "ignores replace-if-unchanged writes (If-Match)"
        # A key that is not there: CURRENT could be made by a job that saw one which has been deleted since.
        absent = f"{key}-absent"
        if not _conflicts(lambda: self.replace(absent, b"fifth", if_match=first)):
            self.delete(absent)
            return "creates an object by a write that is only to replace one (If-Match)"
        return None

    def _write_own(self, key: str, data: bytes, write: Callable[[], str]) -> str:
        """The ETag of a conditional write that nobody else competes with, its answer lost or not."""
        try:
            return write()
        except StoreConflict:
            blob = self.read(key)
            if blob.data != data:
                raise
            return blob.etag


def _conflicts(write: Callable[[], str]) -> bool:
    try:
        write()
    except StoreConflict:
        return True
    return False


def check_key(key: str) -> str:
    """``key`` itself. Raises ConfigError unless it is plain segments: a key cannot leave its store."""
    segments = key.split("/")
    plain = all(part not in ("", ".", "..") and not part.startswith(OWN_FILES) for part in segments)
    if not plain or "\\" in key or "\0" in key or not _is_utf8(key):
        raise ConfigError(
            f"key {key!r}: expected plain segments joined by '/', none of them empty, '.' or '..', beginning with "
            f"{OWN_FILES!r}, or with a backslash or NUL in it; rename the object"
        )
    return key


def _is_utf8(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True
