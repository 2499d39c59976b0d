"""The adapters of a collection: folders that hold anything of an adapter, by one listing of the store."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from cluster.adapters.brought import TOKENIZER_FILES
from cluster.adapters.layout import PLAIN, Layout, layout_for, shown
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


@dataclass(frozen=True)
class Listing:
    """``adapters`` by id. ``within``: folders in another adapter's folder, which its training left there far more often
    than they are an adapter of the tenant ``name``; ``unnamed``: folders that no pattern of the layout names;
    ``folders``: all of them."""

    adapters: list[AdapterFiles]
    within: tuple[str, ...] = ()
    unnamed: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()

    def left_out_lines(self) -> list[str]:
        lines = []
        if self.within:
            many, such = len(self.within), self.within[0]
            lines.append(f"left out {many} folders within adapters' folders, such as {such}: --checkpoints takes them")
        if self.unnamed:
            lines.append(f"left out {len(self.unnamed)} folders that no --id-pattern names, such as {self.unnamed[0]}")
        return lines


def list_adapters(store: Store, layout: Layout | None = None, served: Collection[str] = ()) -> Listing:
    """Every folder of the collection that holds anything of an adapter. One within an adapter's folder is listed where
    the layout says so, and where its id is ``served`` already."""
    layout = layout or Layout()
    folders: dict[str, dict[str, Entry]] = {}
    beside: dict[str, list[Entry]] = {}
    for entry in store.list():
        folder, _, name = entry.key.rpartition("/")
        if name in (CONFIG_FILE, WEIGHTS_FILE) or _OTHERS.fullmatch(name):
            folders.setdefault(folder, {})[name] = entry
        elif name in TOKENIZER_FILES:
            beside.setdefault(folder, []).append(entry)
    adapters = {folder for folder, entries in folders.items() if CONFIG_FILE in entries or WEIGHTS_FILE in entries}
    by_id: dict[str, list[str]] = {}
    within, unnamed = [], []
    inside = {folder: _is_within(folder, adapters) for folder in folders}
    # Those within others last: one that is served is an adapter, but never beside a folder of its own.
    for folder in sorted(folders, key=lambda folder: (inside[folder], folder)):
        adapter_id = layout.id_of(folder)
        if adapter_id is None:
            unnamed.append(printable(folder))
            continue
        adapter_id, own = printable(adapter_id), layout.checkpoints or not inside[folder]
        if own or (adapter_id in served and adapter_id not in by_id):
            by_id.setdefault(adapter_id, []).append(folder)
        else:
            within.append(printable(folder))
    return Listing(
        [
            AdapterFiles(adapter_id, twins=tuple(map(printable, same)))
            if len(same) > 1
            else _files(adapter_id, folders[same[0]], tuple(beside.get(same[0], ())))
            for adapter_id, same in sorted(by_id.items())
        ],
        tuple(within),
        tuple(unnamed),
        tuple(map(printable, sorted(folders))),
    )


def list_collection(address: str, layout: Layout | None = None, served: Collection[str] = ()) -> Listing:
    """The same by address. Raises ConfigError where that is no collection: nothing there, no folder, no adapter in it,
    all of them deeper than an id may be, or the folder of one adapter; StoreError where the store fails otherwise."""
    layout = layout or Layout()
    try:
        listing = list_adapters(open_store(address), layout, served)
    except StoreMissing as error:
        raise ConfigError(f"--adapters: {error}") from None
    ids = {files.adapter_id for files in listing.adapters}
    if not ids and listing.within:
        raise ConfigError(
            f"--adapters {address}: all {len(listing.within)} folders that are named lie within other adapters' "
            f"folders, such as {listing.within[0]}: --checkpoints takes them"
        )
    if not ids and listing.unnamed:
        raise ConfigError(
            f"--adapters {address}: {shown(layout.id_patterns)} names none of the {len(listing.unnamed)} folders "
            f"there, such as {listing.unnamed[0]}"
        )
    if not ids:
        raise ConfigError(f"--adapters {address}: no adapter there; expected folders with adapter_config.json")
    if "" in ids and all(i == "" or _CHECKPOINT.fullmatch(i) for i in [*ids, *listing.within]):
        raise ConfigError(f"--adapters {address}: it is an adapter's own folder; give the folder above it")
    if not layout.id_patterns and all(adapter_id.count("/") >= len(PLAIN) for adapter_id in ids):
        found = layout_for(ids)
        how = shown(found.id_patterns) if found else "--id-pattern with {name} and {tenant} where they stand"
        raise ConfigError(
            f"--adapters {address}: its {len(ids)} adapters lie deeper than name or tenant/name, such as {min(ids)}; "
            f"say what names them: {how}"
        )
    return listing


def _files(adapter_id: str, entries: Mapping[str, Entry], beside: tuple[Entry, ...]) -> AdapterFiles:
    others = tuple(sorted(filter(_OTHERS.fullmatch, entries)))
    return AdapterFiles(adapter_id, entries.get(CONFIG_FILE), entries.get(WEIGHTS_FILE), others, beside)


def _is_within(folder: str, adapters: Collection[str]) -> bool:
    """Whether a folder above it is an adapter's. The collection's own counts for none: its id is refused."""
    while "/" in folder:
        folder = folder.rpartition("/")[0]
        if folder in adapters:
            return True
    return False


def printable(text: str) -> str:
    """What comes from outside goes into messages of one line; a local file name need not even be UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
