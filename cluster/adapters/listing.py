"""The adapters of a collection: folders that hold anything of an adapter, by one listing of the store."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from cluster.adapters.record import AdapterFiles
from cluster.store.protocol import Entry, Store

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Weights in forms that are not read: pickles, shards with their index, MLX's.
_OTHERS = re.compile(
    r"adapter_model.*\.(bin|pt|pth)|adapter_model.+\.safetensors|adapter_model.*\.index\.json|adapters\.(safetensors|npz)"
)


def list_adapters(store: Store) -> list[AdapterFiles]:
    """Every folder of the collection that holds anything of an adapter, by id."""
    folders: dict[str, dict[str, Entry]] = {}
    for entry in store.list():
        folder, _, name = entry.key.rpartition("/")
        if name in (CONFIG_FILE, WEIGHTS_FILE) or _OTHERS.fullmatch(name):
            folders.setdefault(folder, {})[name] = entry
    return [
        AdapterFiles(
            adapter_id=_printable(folder),
            config=entries.get(CONFIG_FILE),
            weights=entries.get(WEIGHTS_FILE),
            others=tuple(sorted(filter(_OTHERS.fullmatch, entries))),
            below=_above(folder, folders),
        )
        for folder, entries in sorted(folders.items())
    ]


def own_folders(
    folders: Iterable[AdapterFiles], served: Collection[str], checkpoints: bool
) -> tuple[list[AdapterFiles], list[str]]:
    """Those that are adapters of their own, and the ids of the others.

    What lies in another adapter's folder is what its training left there (``name/checkpoint-20``) far more often than
    an adapter of the tenant ``name``; it is one where ``checkpoints`` says so, or where it is ``served`` already.
    """
    own, others = [], []
    for files in folders:
        if checkpoints or files.below is None or files.adapter_id in served:
            own.append(files)
        else:
            others.append(files.adapter_id)
    return own, others


def _above(folder: str, folders: Collection[str]) -> str | None:
    """Of the folders above it the nearest that is an adapter's. The collection's own is none: its id is refused."""
    while "/" in folder:
        folder = folder.rpartition("/")[0]
        if folder in folders:
            return _printable(folder)
    return None


def _printable(folder: str) -> str:
    """A local file name need not be UTF-8; its id is refused, and must still be printable."""
    return folder.encode(errors="backslashreplace").decode()
