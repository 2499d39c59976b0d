"""The base model as the compressor sees it: its name, its identity, the linear layers an adapter may change.

Only the config and the headers of the safetensors files are read, never the weights.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.adapters.brought import TOKENIZER_FILES, Tokenizing, read_tokenizing
from cluster.adapters.mistaken import mistaken_for
from cluster.adapters.tensor_file import TensorPlace, read_header, shorten
from cluster.errors import BaseModelError, StoreMissing
from cluster.hashing import canonical_json
from cluster.layer import ModuleShape
from cluster.store.address import open_store
from cluster.store.protocol import Entry, Store

# Written by whoever saved the files, without meaning for what the model computes.
_VOLATILE_KEYS = ("_name_or_path", "_model_name_or_path", "transformers_version", "architectures", "use_cache")
# Two-dimensional weights that are no linear layer inside the model: tables of tokens and positions, and the
# output head, which is often tied to one of them.
_TABLES = ("embed_tokens", "embed_in", "embed_out", "word_embeddings", "wte", "wpe", "lm_head")
_TOKENS = ("embed_tokens", "embed_in", "word_embeddings", "wte")
# Architectures whose projections are stored transposed (transformers' Conv1D).
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt")
_INDEX = "model.safetensors.index.json"
_HUB_SNAPSHOT = re.compile(r"models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/[0-9a-f]+$")


@dataclass(frozen=True)
class BaseModel:
    """``accepted_names`` are those that an adapter's ``base_model_name_or_path`` may carry: names, patterns with *, and
    "" for none at all.

    ``modules`` are the linear layers by full name. ``size_bytes`` is that of the weights as stored.
    ``vocabulary_size``: rows of the table of embeddings, None where it is not told apart.
    """

    name: str
    fingerprint: str
    modules: dict[str, ModuleShape]
    accepted_names: frozenset[str]
    size_bytes: int
    tokenizing: Tokenizing = field(default_factory=Tokenizing)
    vocabulary_size: int | None = None

    def answers_to(self, name: str) -> bool:
        """A pattern never means no name, nor another revision (``name@revision``) than it says."""
        patterns = [one for one in self.accepted_names if "*" in one and ("@" in one or "@" not in name)]
        return name in self.accepted_names or any(name and fnmatch.fnmatchcase(name, one) for one in patterns)


def read_base(address: str, *, name: str | None = None, accept: Iterable[str] = ()) -> BaseModel:
    """Read the base model in the folder ``address`` (``s3://bucket/prefix`` or a local path).

    Its own name is ``name``, else the config's ``_name_or_path``, else the hub's name when the folder lies
    in a hub cache, else the folder's name; ``accept`` are further names adapters may call it by.
    Raises BaseModelError when the folder holds no usable model, StoreError when it cannot be read.
    """
    store = open_store(address)
    config = _read_config(store)
    entries = list(store.list())
    tensors, size_bytes = _read_headers(store, entries)
    if config.get("model_type") in _TRANSPOSED:
        raise BaseModelError(
            f"base model {address}: model_type {config['model_type']!r} stores its projections transposed, "
            "which adapters of this project cannot stand on; use a base whose projections are linear layers"
        )
    modules = {
        tensor.removesuffix(".weight"): ModuleShape(*place.shape)
        for tensor, place in sorted(tensors.items(), key=lambda item: _model_order(item[0]))
        if tensor.endswith(".weight") and len(place.shape) == 2 and not _is_table(tensor)
    }
    if not modules:
        raise BaseModelError(f"base model {address}: no linear layer in its safetensors files")
    own_name = name or _own_name(store.uri, config)
    return BaseModel(
        name=own_name,
        fingerprint=_fingerprint(config, tensors),
        modules=modules,
        accepted_names=frozenset([own_name, *accept]),
        size_bytes=size_bytes,
        tokenizing=read_tokenizing(store, [entry for entry in entries if entry.key in TOKENIZER_FILES]),
        vocabulary_size=next((p.shape[0] for name, p in tensors.items() if _is_table(name, _TOKENS)), None),
    )


def _read_config(store: Store) -> dict[str, Any]:
    data = b""
    try:
        data = store.read("config.json").data
        # Some configs hold Infinity (Mamba's time_step_limit), which canonical JSON does not.
        config = json.loads(data, parse_constant=str)
    except StoreMissing as error:
        raise BaseModelError(
            f"base model {store.uri}: no config.json there ({error}); expected a folder that transformers loads"
        ) from None
    except (ValueError, RecursionError):
        what = mistaken_for(data) or "not JSON; download the model again"
        raise BaseModelError(f"base model {store.uri}: config.json is {what}") from None
    if not isinstance(config, dict):
        raise BaseModelError(f"base model {store.uri}: config.json is not a JSON object; download the model again")
    return config


def _read_headers(store: Store, entries: Iterable[Entry]) -> tuple[dict[str, TensorPlace], int]:
    sizes = {entry.key: entry.size_bytes for entry in entries}
    tensors: dict[str, TensorPlace] = {}
    size_bytes = 0
    for key, names in _weights_files(store, sizes).items():
        try:
            found = read_header(store, key)
        except ValueError as error:
            what = mistaken_for(store.read_range(key, 0, min(sizes[key], 512)))
            problem = f"it is {what}" if what else f"{error}; download it again"
            raise BaseModelError(f"base model {store.uri}/{key}: {problem}") from None
        # The index may name a table that is tied to another and not stored.
        if lacking := sorted(tensor for tensor in names - found.keys() if not _is_table(tensor)):
            raise BaseModelError(
                f"base model {store.uri}/{key}: it lacks {len(lacking)} tensors that {_INDEX} says are in it, such as "
                f"{shorten(lacking[0])}; download the model again"
            )
        tensors |= found
        size_bytes += sizes[key]
    return tensors, size_bytes


def _weights_files(store: Store, sizes: Mapping[str, int]) -> dict[str, set[str]]:
    """The files that transformers would load, with the tensors that the index promises of each; without its usual
    names all there are. A second copy in another layout (``consolidated.safetensors``) is none of them."""
    if "model.safetensors" in sizes:
        return {"model.safetensors": set()}
    if _INDEX not in sizes:
        # Only at the top: sub-folders hold other things (original checkpoints, adapters).
        top = [key for key in sizes if "/" not in key]
        files = [key for key in top if key.endswith(".safetensors") and not key.startswith("adapter_")]
        if not files:
            raise BaseModelError(
                f"base model {store.uri}: no .safetensors file there; convert the weights to safetensors"
            )
        return {key: set() for key in files}
    data = store.read(_INDEX).data
    promised: dict[str, set[str]] = {}
    try:
        for tensor, key in json.loads(data)["weight_map"].items():
            promised.setdefault(key, set()).add(tensor)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        what = mistaken_for(data) if b"weight_map" not in data else None
        problem = f"is {what}" if what else "has no weight_map of names; download the model again"
        raise BaseModelError(f"base model {store.uri}: {_INDEX} {problem}") from None
    if missing := sorted(str(key) for key in promised if key not in sizes):
        raise BaseModelError(
            f"base model {store.uri}: {len(missing)} of the {len(promised)} files that {_INDEX} names are not there, "
            f"such as {shorten(missing[0])}; download the model again"
        )
    if not promised:
        raise BaseModelError(f"base model {store.uri}: {_INDEX} names no file; download the model again")
    return promised


def _fingerprint(config: dict[str, Any], tensors: dict[str, TensorPlace]) -> str:
    # Not the offsets: how the tensors are sharded and ordered says nothing about the model.
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_KEYS}
    headers = {tensor: [place.dtype, list(place.shape)] for tensor, place in tensors.items()}
    return "sha256:" + hashlib.sha256(canonical_json([kept, headers])).hexdigest()


def _is_table(tensor: str, tables: Iterable[str] = _TABLES) -> bool:
    return tensor.split(".")[-2:-1] in ([table] for table in tables)


def _model_order(tensor: str) -> list[tuple[int, str]]:
    # Layer 2 before layer 10.
    return [(int(part), "") if part.isdigit() else (-1, part) for part in tensor.split(".")]


def _own_name(uri: str, config: dict[str, Any]) -> str:
    recorded = config.get("_name_or_path")
    if isinstance(recorded, str) and recorded and not recorded.startswith(("/", ".")):
        return recorded
    if snapshot := _HUB_SNAPSHOT.search(uri):
        return f"{snapshot['org']}/{snapshot['name']}"
    return uri.rsplit("/", 1)[-1]
