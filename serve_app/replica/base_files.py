"""The base model's files on the machine that loads them.

A base is a local folder, a prefix in a store (``s3://...``), or a hub id (``org/name``), which is left to
the hub's own library and cache.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from cluster.adapters.base import read_base
from cluster.bundle.manifest import Base
from cluster.errors import BaseModelError, StoreConflict
from cluster.store.address import open_store
from cluster.store.protocol import Entry, Store

PIECE_BYTES = 64 * 2**20
# Other formats of the same weights; pickles among them are never loaded.
_NOT_NEEDED = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")


def is_hub_id(base: str) -> bool:
    """``org/name``, unless there is such a folder here."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", base) is not None and not Path(base).is_dir()


def resolve_base(base: str, expected: Base, cache: Path | None = None) -> Path:
    """A local folder that transformers can load, holding the base model ``expected``.

    What lies in S3 is downloaded once into ``cache`` (``default_cache()``), a folder for
    each state of the prefix. Raises BaseModelError when it is another model, StoreError when it cannot be read.
    """
    if is_hub_id(base):
        folder = _from_hub(base)
    elif base.startswith("s3://"):
        folder = download(open_store(base), cache or default_cache())
    else:
        folder = Path(open_store(base).uri)
    check_base(base, read_base(str(folder)).fingerprint, expected)
    return folder


def check_base(base: str, fingerprint: str, expected: Base) -> None:
    """Raises BaseModelError unless the model at ``base`` is the one that the bundle's adapters stand on."""
    if fingerprint != expected.fingerprint:
        raise BaseModelError(
            f"base model {base} has fingerprint {fingerprint[:19]}..., the bundle was made for {expected.name} with "
            f"{expected.fingerprint[:19]}...; give that model as base=..., or run the compression job for this one"
        )


def default_cache() -> Path:
    """Where desktops and servers keep what can be fetched again: ``$XDG_CACHE_HOME``, else ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress-then-serve"


def download(store: Store, cache: Path) -> Path:
    """Copy the files at the top of ``store`` to a folder of ``cache`` named by their ETags.

    The folder appears under its name when it is whole, so that neither a killed download nor two replicas
    of one machine at once leave half a model behind.
    """
    entries = [e for e in store.list() if "/" not in e.key and not e.key.endswith(_NOT_NEEDED)]
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


def _from_hub(base: str) -> Path:
    # Here: a base in a folder or a store needs no hub.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, ignore_patterns=[f"*{ending}" for ending in _NOT_NEEDED]))
    except Exception as error:  # the hub's library raises its own, requests' and OSError
        raise BaseModelError(
            f"base model {base}: no such folder here, and the hub did not give it ({type(error).__name__}: {error}); "
            "give a local folder, an s3:// prefix, or a hub id that can be reached"
        ) from None
