"""Reading PEFT adapters from a collection, and refusing what cannot be served rightly.

An adapter is a folder ``adapter_config.json`` + ``adapter_model.safetensors``; its id is the folder's path
under the collection's prefix, or what a pattern makes of it (layout.py). It is read whole once (``read_adapter``:
validated, measured, hashed) and then by ranges (``read_modules``), each request tied to the ETag of the first read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from cluster.adapters.base import BaseModel
from cluster.adapters.brought import Tokenizing, brought_along, read_tokenizing
from cluster.adapters.checks import Refuse, check_id, check_patterns, paired_places, plain_names, tensor_name
from cluster.adapters.config import parse_adapter_config
from cluster.adapters.factors import Factors, factored_energy
from cluster.adapters.listing import CONFIG_FILE, WEIGHTS_FILE
from cluster.adapters.mistaken import mistaken_for
from cluster.adapters.record import AdapterFiles, AdapterRecord, ModulePlaces
from cluster.adapters.tensor_file import TensorPlace, decode, parse_header
from cluster.errors import AdapterChanged, StoreConflict, StoreMissing
from cluster.hashing import canonical_json, hash_tensors
from cluster.store.protocol import Blob, Store

MAX_WEIGHTS_BYTES = 4 << 30  # read whole by one task; a LoRA of a 70B model stays below
MAX_CONFIG_BYTES = 1 << 20
# Two reads closer than this are one request: a gap costs less than a round trip.
_MERGE_GAP_BYTES = 64 << 10


def read_adapter(store: Store, files: AdapterFiles, base: BaseModel) -> tuple[AdapterRecord, dict[str, Factors]]:
    """Read an adapter whole and check everything that can be checked.

    Returns its record and its factors by module. Raises AdapterRefused with the first thing that is wrong,
    StoreError when the store fails.
    """
    refuse = Refuse(files.adapter_id)
    if files.twins:
        raise refuse(
            "id", f"{len(files.twins)} folders have this id: {', '.join(files.twins)}; the pattern must part them"
        )
    check_id(files.adapter_id, base)
    if files.config is None:
        raise refuse("no-config", f"there is no {CONFIG_FILE} beside its weights")
    if files.weights is None:
        raise refuse(*_no_weights(files.others))
    for entry, limit in ((files.config, MAX_CONFIG_BYTES), (files.weights, MAX_WEIGHTS_BYTES)):
        if entry.size_bytes > limit:
            raise refuse("too-large", f"{entry.key} has {entry.size_bytes} bytes, at most {limit} are read")

    config_bytes = _read(refuse, store, files.config.key).data
    config = parse_adapter_config(files.adapter_id, config_bytes)
    if not base.answers_to(config.base_name):
        raise refuse("base", _other_base(config.base_name, base))
    weights = _read(refuse, store, files.weights.key)
    places = _places(refuse, weights.data)
    try:
        tensors = load_tensors(weights.data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError, AssertionError) as error:
        # All that library and torch raise on shapes nobody can have, such as [0, 2**63].
        raise refuse("corrupt", f"{files.weights.key} is not valid safetensors ({error})") from None

    names = plain_names(refuse, places, base)
    check_patterns(refuse, names, config)
    places = {names[name]: place for name, place in places.items()}
    tensors = {names[name]: tensor for name, tensor in tensors.items()}
    modules, factors = {}, {}
    for module, (place_A, place_B) in paired_places(refuse, places, config, base).items():
        A = tensors[tensor_name(module, "A")].float()
        B = tensors[tensor_name(module, "B")].float() * config.scale(module)
        if not (A.isfinite().all() and B.isfinite().all()):
            raise refuse("not-finite", f"module {module} holds NaN or infinity")
        energy = factored_energy(A, B)
        # Far above anything trained; its square would not fit float32 and would poison a shared basis.
        if not energy < 1e30:
            raise refuse("not-finite", f"module {module} has the squared norm {energy:.3g}, at most 1e30 is accepted")
        modules[module] = ModulePlaces(place_A, place_B, config.scale(module), energy)
        factors[module] = (A, B)
    if not any(places.energy > 0 for places in modules.values()):
        raise refuse("zero", "it changes nothing: B A is zero in every module (was it trained?)")
    tokenizing = read_tokenizing(store, files.beside)
    record = AdapterRecord(
        adapter_id=files.adapter_id,
        key=files.weights.key,
        version=_version(config_bytes, tensors, tokenizing),
        etag=weights.etag,
        size_bytes=len(weights.data),
        modules=modules,
        brought=brought_along(tokenizing, base.tokenizing, base.vocabulary_size),
    )
    return record, factors


def read_modules(store: Store, record: AdapterRecord, modules: Collection[str]) -> dict[str, Factors]:
    """The factors of those of ``modules`` that the adapter touches, by few ranged requests.

    Raises AdapterChanged when the file is no longer the one that ``record`` describes.
    """
    wanted = [record.modules[module] for module in modules if module in record.modules]
    places = sorted({place for module in wanted for place in (module.A, module.B)}, key=lambda place: place.start)
    data: dict[TensorPlace, bytes] = {}
    for run in _merge(places):
        start, end = run[0].start, max(place.end for place in run)
        try:
            chunk = store.read_range(record.key, start, end - start, if_match=record.etag)
        except (StoreConflict, StoreMissing):
            raise AdapterChanged(
                record.adapter_id, f"{record.key} is not the file that was read first; run the job again to include it"
            ) from None
        for place in run:
            data[place] = chunk[place.start - start : place.end - start]
    return {
        module: (decode(found.A, data[found.A]), decode(found.B, data[found.B]) * found.scale)
        for module in modules
        if (found := record.modules.get(module)) is not None
    }


def _no_weights(others: Sequence[str]) -> tuple[str, str]:
    """Reason and message."""
    if pickles := [name for name in others if not name.endswith((".safetensors", ".npz", ".json"))]:
        message = f"its weights are pickled ({pickles[0]}); pickle is never loaded, save them as {WEIGHTS_FILE}"
        return "pickle", message
    if any(name.startswith("adapters.") for name in others):
        return "no-weights", f"it was saved by MLX ({others[0]}); convert it to PEFT's {WEIGHTS_FILE}"
    if others:
        return "no-weights", f"its weights are in shards ({others[0]}); save them as one {WEIGHTS_FILE}"
    return "no-weights", f"there is no {WEIGHTS_FILE}"


def _other_base(name: str, base: BaseModel) -> str:
    known = " or ".join(sorted(filter(None, base.accepted_names)))
    if not name:
        return f"its config names no base; if it was trained on this one ({known}), add --accept-unnamed-base"
    told = f"it was trained on {name!r}, this base is {known}"
    if "*" in name or "--" in name or not name.isprintable():
        return f"{told}; correct the name in its config"  # as an option it would mean more than itself
    # For a shell, whatever the name holds.
    between = "=" if name.startswith("-") else " "
    return f"{told}; if that is the same model, add --accept-base{between}'" + name.replace("'", "'\\''") + "'"


def _read(refuse: Refuse, store: Store, key: str) -> Blob:
    try:
        return store.read(key)
    except StoreConflict as error:
        raise refuse("changed", str(error)) from None


def _places(refuse: Refuse, data: bytes) -> dict[str, TensorPlace]:
    try:
        return parse_header(data, len(data))
    except ValueError as error:
        if what := mistaken_for(data):
            raise refuse("pickle" if "pickle" in what else "corrupt", f"{WEIGHTS_FILE} is {what}") from None
        raise refuse("corrupt", f"{WEIGHTS_FILE}: {error}; upload it again") from None


def _version(config: bytes, tensors: dict[str, Tensor], tokenizing: Tokenizing) -> str:
    """Of the adapter's own files alone. What lies beside its weights is part of it, so that `update` takes up another
    template; what cannot be read is not, for the next time it may."""
    content: list[object] = [hashlib.sha256(config).hexdigest(), hash_tensors(tensors)]
    if tokenizing.is_known:
        content.append(asdict(replace(tokenizing, unreadable=())))
    return "sha256:" + hashlib.sha256(canonical_json(content)).hexdigest()


def _merge(places: list[TensorPlace]) -> list[list[TensorPlace]]:
    runs: list[list[TensorPlace]] = []
    end = 0
    for place in places:
        if runs and place.start - end <= _MERGE_GAP_BYTES:
            runs[-1].append(place)
        else:
            runs.append([place])
        end = max(end, place.end)
    return runs
