"""The adapters of a collection: folders that hold anything of an adapter, by one listing of the store."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from cluster.adapters.record import AdapterFiles
from cluster.errors import ConfigError, StoreMissing
from cluster.store.address import open_store
from cluster.store.protocol import Entry, Store

_CHECKPOINT = re.compile(r"checkpoint-[0-9]+")  # of transformers' Trainer
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
    adapters = {folder for folder, entries in folders.items() if CONFIG_FILE in entries or WEIGHTS_FILE in entries}
    return [
        AdapterFiles(
            adapter_id=printable(folder),
            config=entries.get(CONFIG_FILE),
            weights=entries.get(WEIGHTS_FILE),
            others=tuple(sorted(filter(_OTHERS.fullmatch, entries))),
            below=_above(folder, adapters),
        )
        for folder, entries in sorted(folders.items())
    ]


def list_collection(address: str) -> list[AdapterFiles]:
    """The same by address. Raises ConfigError where that is no collection: nothing there, no folder, no adapter in it,
    or the folder of one adapter; StoreError where the store fails otherwise."""
    store = open_store(address)
    try:
        folders = list_adapters(store)
    except StoreMissing as error:
        raise ConfigError(f"--adapters: {error}") from None
    if not folders:
        raise ConfigError(f"--adapters {address}: no adapter there; expected folders with adapter_config.json")
    ids = {files.adapter_id for files in folders}
    if "" in ids and all(adapter_id == "" or _CHECKPOINT.fullmatch(adapter_id) for adapter_id in ids):
        raise ConfigError(f"--adapters {address}: it is an adapter's own folder; give the folder above it")
    return folders


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


def _above(folder: str, adapters: Collection[str]) -> str | None:
    """Of the folders above it the nearest that is an adapter's. The collection's own is none: its id is refused."""
    while "/" in folder:
        folder = folder.rpartition("/")[0]
        if folder in adapters:
            return printable(folder)
    return None


def printable(text: str) -> str:
    """What comes from outside goes into messages of one line; a local file name need not even be UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
