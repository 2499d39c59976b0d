"""Reading PEFT adapters from a collection, and refusing what cannot be served rightly.

An adapter is a folder ``adapter_config.json`` + ``adapter_model.safetensors``; its id is the folder's path
under the collection's prefix. It is read whole once (``read_adapter``: validated, measured, hashed) and
then by ranges (``read_modules``), each request tied to the ETag of the first read.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from cluster.adapters.base import BaseModel
from cluster.adapters.config import AdapterConfig, parse_adapter_config
from cluster.adapters.tensor_file import DTYPES, TensorPlace, decode, parse_header
from cluster.bundle.manifest import canonical_json
from cluster.errors import AdapterChanged, AdapterRefused, StoreConflict, StoreMissing
from cluster.store.protocol import Blob, Entry, Store

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_WEIGHTS_BYTES = 4 << 30  # read whole by one task; a LoRA of a 70B model stays below
MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 4096  # its square is allocated
_MAX_MESSAGE_SIZE = 600
# Two reads closer than this are one request: a gap costs less than a round trip.
_MERGE_GAP_BYTES = 64 << 10

_EPSILON = torch.finfo(torch.float32).eps
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_PICKLE = re.compile(r"adapter_model.*\.(bin|pt|pth)")
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
# What else PEFT writes into the file, by the reason it is refused for; the first that matches counts.
_FOREIGN_TENSORS = (
    (re.compile(r"lora_magnitude_vector"), "dora", "a DoRA magnitude"),
    (
        re.compile(r"lora_embedding_|(embed_tokens|wte|wpe|word_embeddings|lm_head)\."),
        "embeddings",
        "a trained embedding or head",
    ),
    (re.compile(r"trainable_tokens"), "embeddings", "trained tokens"),
    (re.compile(r"lora_[AB]\.bias"), "lora-bias", "a bias of a LoRA factor"),
    (re.compile(r"\.bias$"), "bias", "a trained bias"),
    (re.compile(r"modules_to_save|\.weight$"), "modules-to-save", "a fully trained module"),
)  # fmt: skip

Factors = tuple[Tensor, Tensor]
"""(A (r, d_in), B (d_out, r)), float32, the scale folded into B: the module's change is M = B A."""


@dataclass(frozen=True)
class AdapterFiles:
    """What the listing says of an adapter's folder."""

    adapter_id: str
    config: Entry | None
    weights: Entry | None
    has_pickle: bool


@dataclass(frozen=True)
class ModulePlaces:
    """Where one module's factors lie in the weights file, and ``energy`` = ||B A||_F^2 with the scale in B."""

    A: TensorPlace
    B: TensorPlace
    scale: float
    energy: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class AdapterRecord:
    """An accepted adapter: enough to read any of its modules again. ``version`` identifies the source."""

    adapter_id: str
    key: str
    version: str
    etag: str
    size_bytes: int
    modules: dict[str, ModulePlaces]

    @property
    def energy(self) -> float:
        return math.fsum(places.energy for places in self.modules.values())


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


def read_adapter(store: Store, files: AdapterFiles, base: BaseModel) -> tuple[AdapterRecord, dict[str, Factors]]:
    """Read an adapter whole and check everything that can be checked.

    Returns its record and its factors by module. Raises AdapterRefused with the first thing that is wrong,
    StoreError when the store fails.
    """
    refuse = _Refuse(files.adapter_id)
    check_id(files.adapter_id, base)
    if files.config is None:
        raise refuse("no-config", f"there is no {CONFIG_FILE} beside its weights")
    if files.weights is None:
        if files.has_pickle:
            raise refuse(
                "pickle", f"its weights are pickled (.bin); pickle is never loaded, save them as {WEIGHTS_FILE}"
            )
        raise refuse("no-weights", f"there is no {WEIGHTS_FILE}")
    for entry, limit in ((files.config, MAX_CONFIG_BYTES), (files.weights, MAX_WEIGHTS_BYTES)):
        if entry.size_bytes > limit:
            raise refuse("too-large", f"{entry.key} has {entry.size_bytes} bytes, at most {limit} are read")

    config_bytes = _read(refuse, store, files.config.key).data
    config = parse_adapter_config(files.adapter_id, config_bytes)
    if config.base_name not in base.accepted_names:
        raise refuse(
            "base",
            f"it was trained on {config.base_name!r}, this base is {' or '.join(sorted(base.accepted_names))}; "
            f"if that is the same model, add --accept-base {config.base_name!r}",
        )
    weights = _read(refuse, store, files.weights.key)
    places = _places(refuse, weights.data)
    try:
        tensors = load_tensors(weights.data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError, AssertionError) as error:
        # All that library and torch raise on shapes nobody can have, such as [0, 2**63].
        raise refuse("corrupt", f"{files.weights.key} is not valid safetensors ({error})") from None

    modules, factors = {}, {}
    for module, (place_A, place_B) in _pairs(refuse, places, config, base).items():
        A = tensors[_tensor_name(module, "A")].float()
        B = tensors[_tensor_name(module, "B")].float() * config.scale(module)
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
    record = AdapterRecord(
        adapter_id=files.adapter_id,
        key=files.weights.key,
        version=_version(config_bytes, tensors),
        etag=weights.etag,
        size_bytes=len(weights.data),
        modules=modules,
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


def check_id(adapter_id: str, base: BaseModel) -> None:
    """One or two plain segments, and never a name of the base: that would hide one behind the other."""
    segments = adapter_id.split("/")
    if not (1 <= len(segments) <= 2 and all(map(_SEGMENT.fullmatch, segments))):
        raise AdapterRefused(
            adapter_id,
            "id",
            "an id is its folder's path under the collection, one or two segments of letters, digits, '_', '-' and "
            "'.', not beginning with '-' or '.'; rename or move the folder",
        )
    if adapter_id in base.accepted_names:
        raise AdapterRefused(adapter_id, "id", "it has the base model's name; rename the folder")


def factored_energy(A: Tensor, B: Tensor) -> float:
    """||B A||_F^2 = tr((B^T B)(A A^T)), in float64; A (r, d_in), B (d_out, r). The product is never formed.

    0 where B A cancels to less than the rounding of float32 factors: nothing of it is left in them, and the
    trace, itself a rounding error then, may even come out negative.
    """
    A, B = A.double(), B.double()
    return gram_energy(A @ A.T, B.T @ B)


def gram_energy(gram_A: Tensor, gram_B: Tensor) -> float:
    """``factored_energy`` from A A^T and B^T B, (r, r) float64."""
    energy = float((gram_A * gram_B).sum())
    without_cancelling = float((gram_A.diagonal() * gram_B.diagonal()).sqrt().sum())
    return energy if energy > (_EPSILON * without_cancelling) ** 2 else 0.0


class _Refuse:
    def __init__(self, adapter_id: str) -> None:
        self.adapter_id = adapter_id

    def __call__(self, reason: str, message: str) -> AdapterRefused:
        # Names and numbers of the file stand in it, and the message goes into the manifest.
        if len(message) > _MAX_MESSAGE_SIZE:
            message = message[:_MAX_MESSAGE_SIZE] + "..."
        message = message.encode(errors="backslashreplace").decode()
        return AdapterRefused(self.adapter_id, reason, message)


def _read(refuse: _Refuse, store: Store, key: str) -> Blob:
    try:
        return store.read(key)
    except StoreConflict as error:
        raise refuse("changed", str(error)) from None


def _places(refuse: _Refuse, data: bytes) -> dict[str, TensorPlace]:
    try:
        return parse_header(data, len(data))
    except ValueError as error:
        raise refuse("corrupt", f"{WEIGHTS_FILE}: {error}; upload it again") from None


def _pairs(
    refuse: _Refuse, places: dict[str, TensorPlace], config: AdapterConfig, base: BaseModel
) -> dict[str, tuple[TensorPlace, TensorPlace]]:
    """Module -> places of (A, B), after every check of names, shapes, dtypes and ranks."""
    found: dict[str, dict[str, TensorPlace]] = {}
    for name, place in places.items():
        match = _TENSOR.fullmatch(name)
        # lora_A / lora_B of an embedding table or head parse as well; the base has no such linear layer.
        if match is None or re.search(_FOREIGN_TENSORS[1][0], f"{match['module']}."):
            raise _foreign(refuse, name)
        found.setdefault(match["module"], {})[match["factor"]] = place
    if not found:
        raise refuse("no-module", f"{WEIGHTS_FILE} holds no tensor")
    for module in sorted(found):
        _check_module(refuse, module, found[module], config, base)
    # The base's modules that the config names but the file lacks: PEFT would train them, so they got lost.
    missing = [module for module in base.modules if module not in found and config.targets(module)]
    if missing and config.target_modules != "all-linear":
        raise refuse(
            "missing-module",
            f"its config targets {len(missing)} modules without tensors in the file, such as {missing[0]}",
        )
    return {module: (pair["A"], pair["B"]) for module, pair in sorted(found.items())}


def _check_module(
    refuse: _Refuse, module: str, pair: dict[str, TensorPlace], config: AdapterConfig, base: BaseModel
) -> None:
    if module not in base.modules:
        raise refuse("module", f"module {module} does not exist in the base {base.name}, or is no linear layer")
    if len(pair) == 1:
        raise refuse("partner", f"module {module} has lora_{next(iter(pair))} without its partner")
    for place in pair.values():
        if place.dtype not in DTYPES:
            raise refuse("dtype", f"module {module} is stored as {place.dtype}, expected one of {', '.join(DTYPES)}")
    if not config.targets(module):
        raise refuse("no-module", f"module {module} has tensors, but the config's target_modules do not match it")
    shape, rank = base.modules[module], config.rank(module)
    A, B = pair["A"].shape, pair["B"].shape
    if len(A) != 2 or len(B) != 2 or A[1] != shape.d_in or B[0] != shape.d_out or A[0] != B[1]:
        raise refuse(
            "shape",
            f"module {module} has A {list(A)} and B {list(B)}, "
            f"expected [r, {shape.d_in}] and [{shape.d_out}, r] of one rank r",
        )
    if A[0] > MAX_RANK:
        raise refuse("rank", f"module {module} has rank {A[0]}, at most {MAX_RANK} is accepted")
    if A[0] != rank:
        raise refuse("rank", f"module {module} has rank {A[0]} in its tensors, {rank} in its config")


def _foreign(refuse: _Refuse, tensor: str) -> AdapterRefused:
    for pattern, reason, what in _FOREIGN_TENSORS:
        if pattern.search(tensor):
            return refuse(reason, f"tensor {tensor!r} is {what}; only LoRA factors of linear layers are supported")
    return refuse("unknown-tensor", f"tensor {tensor!r} is not one that PEFT's LoRA writes")


def _tensor_name(module: str, factor: str) -> str:
    return f"base_model.model.{module}.lora_{factor}.weight"


def _version(config: bytes, tensors: dict[str, Tensor]) -> str:
    return (
        "sha256:"
        + hashlib.sha256(canonical_json([hashlib.sha256(config).hexdigest(), hash_tensors(tensors)])).hexdigest()
    )


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """A hash over names, dtypes, shapes and bytes, whatever the order."""
    digests = {
        name: [str(t.dtype), list(t.shape), hashlib.sha256(t.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()]
        for name, t in tensors.items()
    }
    return "sha256:" + hashlib.sha256(canonical_json(digests)).hexdigest()


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
