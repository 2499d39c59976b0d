"""The adapters of a collection: folders that hold anything of an adapter, by one listing of the store."""

from __future__ import annotations

import re

from cluster.adapters.record import AdapterFiles
from cluster.store.protocol import Entry, Store

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE = re.compile(r"adapter_model.*\.(bin|pt|pth)")


def list_adapters(store: Store) -> list[AdapterFiles]:
    """Every folder of the collection that holds anything of an adapter, by id."""
    folders: dict[str, dict[str, Entry]] = {}
    for entry in store.list():
        folder, _, name = entry.key.rpartition("/")
        if name in (CONFIG_FILE, WEIGHTS_FILE) or _PICKLE.fullmatch(name):
            folders.setdefault(folder, {})[name] = entry
    return [
        AdapterFiles(
            # A local file name need not be UTF-8; its id is refused, and must still be printable.
            adapter_id=folder.encode(errors="backslashreplace").decode(),
            config=entries.get(CONFIG_FILE),
            weights=entries.get(WEIGHTS_FILE),
            has_pickle=any(map(_PICKLE.fullmatch, entries)),
        )
        for folder, entries in sorted(folders.items())
    ]
