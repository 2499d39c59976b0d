"""A base model's files, brought from a store to a folder here, once for each state of them."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from cluster.errors import BaseModelError, StoreConflict
from cluster.store.protocol import Entry, Store

PIECE_BYTES = 64 * 2**20
NOT_NEEDED = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")
"""Other formats of the same weights; pickles among them are never loaded."""


def default_cache() -> Path:
    """Where desktops and servers keep what can be fetched again: ``$XDG_CACHE_HOME``, else ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress-then-serve"


def download(store: Store, cache: Path) -> Path:
    """Copy the files at the top of ``store`` to a folder of ``cache`` named by their ETags.

    The folder appears under its name when it is whole, so that neither a killed download nor two processes
    of one machine at once leave half a model behind.
    """
    entries = [e for e in store.list() if "/" not in e.key and not e.key.endswith(NOT_NEEDED)]
    state = "\n".join([store.uri, *(f"{e.key} {e.size_bytes} {e.etag}" for e in entries)])
    folder = cache / hashlib.sha256(state.encode()).hexdigest()[:32]
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="partial-", dir=cache))
    try:
        for entry in entries:
            _copy(store, entry, partial / entry.key)
        partial.rename(folder)
    except OSError:
        # Another replica was faster: a folder cannot be renamed onto one that holds files.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _copy(store: Store, entry: Entry, path: Path) -> None:
    with path.open("xb") as file:
        for start in range(0, entry.size_bytes, PIECE_BYTES):
            length = min(PIECE_BYTES, entry.size_bytes - start)
            try:
                file.write(store.read_range(entry.key, start, length, if_match=entry.etag))
            except StoreConflict:
                raise BaseModelError(
                    f"base model {store.uri}: {entry.key} changed while it was downloaded; start again when it is whole"
                ) from None
        file.flush()
        os.fsync(file.fileno())
