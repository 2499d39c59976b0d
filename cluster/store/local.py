"""A folder as a store. Open one with ``cluster.store.address.open_store``.

Symlinks are followed, because a Hugging Face cache is made of them. The ETag is cheap: modification time,
size and inode, so it changes whenever a file is replaced or rewritten, and costs no read.
Conditional writes hold between all users of this class on hosts that share the folder's ``flock``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO
from uuid import uuid4

from cluster.errors import StoreConflict, StoreError, StoreForbidden, StoreMissing, StoreUnsafe
from cluster.store.protocol import OWN_FILES, Blob, Entry, Store, check_key

_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_LOCKS_OR_LINKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class LocalStore(Store):
    """``uri`` is an absolute path. The folder need not exist: the first write makes it."""

    def __init__(self, path: str) -> None:
        self.uri = path

    def list(self, prefix: str = "") -> Iterator[Entry]:
        with self._errors("", expected="a folder"):
            return iter(sorted(self._walk(self.uri, "", prefix, ()), key=lambda entry: entry.key))

    def head(self, key: str) -> Entry:
        path = self._path(key)
        with self._errors(key):
            info = os.stat(path)
            _check_regular(info)
        return _entry(key, info)

    def read(self, key: str, *, if_match: str | None = None) -> Blob:
        with self._errors(key), self._opened(key, if_match) as (file, info):
            return Blob(file.read(), _etag(info))

    def read_range(self, key: str, start: int, length: int, *, if_match: str | None = None) -> bytes:
        assert min(start, length) >= 0, (start, length)
        with self._errors(key), self._opened(key, if_match) as (file, info):
            if start + length > info.st_size:
                raise StoreConflict(
                    f"{self.uri}/{key} is {info.st_size} bytes long, {length} bytes from {start} on were expected; "
                    "it is cut short, or it changed: write it again"
                )
            file.seek(start)
            return file.read(length)

    def write(self, key: str, data: bytes) -> str:
        path = self._path(key)
        with self._errors(key), _staged(path, data) as (temporary, etag), _locked(path):
            os.replace(temporary, path)
            _sync_folder(path)
            return etag

    def create(self, key: str, data: bytes) -> str:
        path = self._path(key)
        with self._errors(key), _staged(path, data) as (temporary, etag):
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise StoreConflict(f"{self.uri}/{key} already exists, expected to create it") from None
            _sync_folder(path)
            return etag

    def replace(self, key: str, data: bytes, *, if_match: str) -> str:
        path = self._path(key)
        with self._errors(key):
            try:
                with _locked(path):
                    seen = _etag(os.stat(path))
                    if seen != if_match:
                        raise StoreConflict(f"{self.uri}/{key} changed: its ETag is {seen}, expected {if_match}")
                    with _staged(path, data) as (temporary, etag):
                        os.replace(temporary, path)
                    _sync_folder(path)
                    return etag
            except FileNotFoundError:
                raise StoreConflict(f"{self.uri}/{key} is gone, expected ETag {if_match}") from None

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._errors(key), suppress(FileNotFoundError, NotADirectoryError), _locked(path):
            os.unlink(path)

    def _path(self, key: str) -> str:
        return os.path.join(self.uri, check_key(key))

    def _walk(self, folder: str, base: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[Entry]:
        """Entries below ``folder``, whose keys start with ``base``. ``above`` identifies the folders on the way
        down: a link to one of them is a loop, and not followed."""
        info = os.stat(folder)
        if (info.st_dev, info.st_ino) in above:
            return
        for name in os.listdir(folder):
            key, path = base + name, os.path.join(folder, name)
            if name.startswith(OWN_FILES):
                continue
            try:
                item = os.stat(path)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ELOOP):  # a link to nowhere, or removed since
                    continue
                raise
            if stat.S_ISDIR(item.st_mode):
                if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                    yield from self._walk(path, f"{key}/", prefix, (*above, (info.st_dev, info.st_ino)))
            elif stat.S_ISREG(item.st_mode) and key.startswith(prefix):
                yield _entry(key, item)

    @contextmanager
    def _opened(self, key: str, if_match: str | None) -> Iterator[tuple[BinaryIO, os.stat_result]]:
        """The file and its state. What is checked and what is read is one descriptor, so that a file replaced
        meanwhile does not matter; one rewritten in place is noticed afterwards."""
        # O_NONBLOCK: opening a named pipe would wait for its other end.
        with open(os.open(self._path(key), os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            info = os.fstat(file.fileno())
            _check_regular(info)
            if if_match not in (None, _etag(info)):
                raise StoreConflict(f"{self.uri}/{key} changed: its ETag is {_etag(info)}, expected {if_match}")
            yield file, info
            if _etag(os.fstat(file.fileno())) != _etag(info):
                raise StoreConflict(f"{self.uri}/{key} was rewritten while it was read; let its writer finish first")

    @contextmanager
    def _errors(self, key: str, expected: str = "a file") -> Iterator[None]:
        where = f"{self.uri}/{key}" if key else self.uri
        try:
            yield
        except OSError as error:
            seen = error.strerror or str(error)
            at = f" (at {error.filename})" if error.filename not in (None, where) else ""
            if error.errno in _NO_SUCH_FILE:
                raise StoreMissing(f"{where}: {seen}{at}, expected {expected}; check the path") from error
            if error.errno in _NOT_ALLOWED:
                raise StoreForbidden(
                    f"{where}: {seen}{at} for user id {os.geteuid()}; change the permissions, or run as their owner"
                ) from error
            if error.errno in _NO_LOCKS_OR_LINKS:
                raise StoreUnsafe(
                    f"{where}: {seen}{at}: this file system has no locks or no hard links, so two jobs could "
                    "overwrite each other unnoticed; use another folder, or s3://"
                ) from error
            raise StoreError(f"{where}: {seen}{at}; check the path and the disk behind it") from error


@contextmanager
def _staged(path: str, data: bytes) -> Iterator[tuple[str, str]]:
    """A temporary file beside ``path`` that holds ``data``, on disk, and the ETag it keeps when renamed."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{OWN_FILES}{uuid4().hex}")
    try:
        # Not tempfile: its files are 0600, and who serves is often not the user who compressed.
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            # The kernel stamps files once a tick only; two versions must never carry the same time.
            os.utime(file.fileno(), ns=(time.time_ns(),) * 2)
            os.fsync(file.fileno())
            etag = _etag(os.fstat(file.fileno()))
        yield temporary, etag
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """One writer at a time between checking ``path`` and renaming over it, among threads, processes, hosts."""
    lock = os.open(os.path.join(os.path.dirname(path), f"{OWN_FILES}lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _sync_folder(path: str) -> None:
    """A rename is on disk only when its folder is: without it a manifest could outlive what it names."""
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _entry(key: str, info: os.stat_result) -> Entry:
    return Entry(key, info.st_size, _etag(info), info.st_mtime_ns / 1e9)


def _etag(info: os.stat_result) -> str:
    return f"{info.st_mtime_ns:x}-{info.st_size:x}-{info.st_ino:x}"


def _check_regular(info: os.stat_result) -> None:
    if stat.S_ISDIR(info.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(info.st_mode):
        raise FileNotFoundError(errno.ENOENT, "not a regular file")
