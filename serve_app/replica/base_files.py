"""The base model's files on the machine that loads them.

A base is a local folder, a prefix in a store (``s3://...``), or a hub id (``org/name``), which is left to
the hub's own library and cache.
"""

from __future__ import annotations

import re
from pathlib import Path

from cluster.adapters.base import read_base
from cluster.bundle.manifest import Base
from cluster.errors import BaseModelError
from cluster.store.address import open_store
from cluster.store.download import NOT_NEEDED, default_cache, download


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


def _from_hub(base: str) -> Path:
    # Here: a base in a folder or a store needs no hub.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, ignore_patterns=[f"*{ending}" for ending in NOT_NEEDED]))
    except Exception as error:  # the hub's library raises its own, requests' and OSError
        raise BaseModelError(
            f"base model {base}: no such folder here, and the hub did not give it ({type(error).__name__}: {error}); "
            "give a local folder, an s3:// prefix, or a hub id that can be reached"
        ) from None
