"""A folder into a store, as a user would copy it there."""

from __future__ import annotations

from pathlib import Path

from cluster.store.address import open_store


def upload(folder: Path, uri: str) -> str:
    store = open_store(uri)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.write(path.relative_to(folder).as_posix(), path.read_bytes())
    return uri
