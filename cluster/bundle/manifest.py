"""The manifest of a revision: what a bundle holds, as strict JSON.

It is written by the job and read by the application; nothing else passes between the two. Its layout is
shown in the README. Parsing refuses unknown keys, missing keys, wrong types and references that lead
nowhere, so that whoever holds a ``Manifest`` may rely on it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import sys
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar, cast

from cluster.errors import BundleError

FORMAT = 1
MODES = ("core", "truncated", "raw")
METHODS = ("jd-full", "jd-diag", "svd")
ISOLATIONS = ("tenant",)
_SHA = re.compile(r"sha256:[0-9a-f]{64}")
_BUNDLE_ID = re.compile(r"b-[0-9a-f]{16}")
_JSON_TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "tuple[str, ...]": tuple}

T = TypeVar("T")


@dataclass(frozen=True)
class Base:
    """The base model: the name adapters call it by, and the hash of its config and tensor headers."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class Method:
    """All that decides the bytes of a bundle besides its inputs. ``dtype`` is a torch dtype's name.

    ``auto`` names those of ``name``, ``clusters`` and ``rank`` that the job chose itself, for ``target_error``.
    ``isolation`` is "tenant" where no cluster holds adapters of two tenants (the first of two id segments).
    """

    name: str
    clusters: int
    rank: int
    seed: int
    dtype: str
    gate: float
    raw: tuple[str, ...] = ()
    auto: tuple[str, ...] = ()
    target_error: float | None = None
    isolation: str | None = None


@dataclass(frozen=True)
class ModuleShape:
    """A linear layer y = W x with W (d_out, d_in)."""

    d_out: int
    d_in: int


@dataclass(frozen=True)
class Cluster:
    """Object hashes of the shared basis and of the cores, and how many cores there are."""

    basis: str
    cores: str
    num_slots: int


@dataclass(frozen=True)
class Adapter:
    """One served adapter. ``cluster`` and ``slot`` are set for mode core, ``factors`` and ``rank`` otherwise.

    ``version`` is the hash of the source, ``served`` that of what is answered with.
    ``error`` = sum_m ||M - M^||^2 / sum_m ||M||^2 over the modules the adapter touches.
    ``added`` is the revision that put it onto bases which had been fitted without it; None: it was fitted.
    """

    version: str
    etag: str
    mode: str
    served: str
    error: float
    error_unweighted: float
    error_worst_module: float
    cluster: str | None = None
    slot: int | None = None
    factors: str | None = None
    rank: int | None = None
    added: int | None = None


@dataclass(frozen=True)
class Refused:
    """An adapter that is not served, and why."""

    reason: str
    message: str


@dataclass(frozen=True)
class Manifest:
    bundle: str
    revision: int
    parent: int | None
    base: Base
    method: Method
    modules: dict[str, ModuleShape]
    clusters: dict[str, Cluster]
    adapters: dict[str, Adapter]
    refused: dict[str, Refused]
    objects: dict[str, int] = field(default_factory=dict)
    """sha256 name of each object -> size in bytes."""

    def to_json(self) -> bytes:
        """Canonical bytes: sorted keys, absent optional fields left out."""
        document: dict[str, Any] = {"format": FORMAT, **asdict(self)}
        document["adapters"] = {adapter_id: _said(adapter) for adapter_id, adapter in document["adapters"].items()}
        document["method"] = _said(document["method"])
        if not self.method.auto:
            del document["method"]["auto"]
        document["objects"] = {sha: {"size_bytes": size} for sha, size in self.objects.items()}
        return canonical_json(document, indent=1) + b"\n"

    def with_own_id(self) -> Manifest:
        """The same manifest, named by its content: revision, parent and ETags (which a re-upload of the
        same bytes changes) do not count."""
        anonymous = replace(
            self,
            bundle="",
            revision=0,
            parent=None,
            adapters={adapter_id: replace(adapter, etag="") for adapter_id, adapter in self.adapters.items()},
        )
        return replace(self, bundle="b-" + hashlib.sha256(anonymous.to_json()).hexdigest()[:16])

    def resident_bytes(self) -> int:
        """Bytes that a device holding every cluster and every factors object needs for them."""
        return sum(self.objects.values())


def tenant_of(adapter_id: str) -> str:
    """The first segment of ``tenant/name``; "" for a plain ``name``."""
    return adapter_id.rpartition("/")[0]


def _said(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def canonical_json(document: Any, indent: int | None = None) -> bytes:
    """JSON whose bytes depend on the content alone: sorted keys, no NaN."""
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(
        document, sort_keys=True, indent=indent, separators=separators, ensure_ascii=False, allow_nan=False
    ).encode()


def served_revision(mode: str, *hashes: str) -> str:
    """Name of what an adapter is answered with: hash of the mode, the basis and the adapter's own tensors."""
    return "sha256:" + hashlib.sha256(canonical_json([mode, *hashes])).hexdigest()


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Raises BundleError, naming ``where`` and the field, unless ``data`` is a valid manifest."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: not JSON ({error}); publish the bundle again") from None
    top = _Fields(document, where)
    if (version := top.take("format", int)) != FORMAT:
        raise BundleError(
            f"{where}: format {version}, this build reads format {FORMAT}; upgrade the reader or run the job again"
        )
    manifest = Manifest(
        bundle=top.take("bundle", str),
        revision=top.take("revision", int),
        parent=top.take_optional("parent", int),
        base=_Fields(top.take("base", dict), f"{where}: base").into(Base),
        method=_parse_method(top.take("method", dict), f"{where}: method"),
        modules={name: f.into(ModuleShape) for name, f in top.children("modules")},
        clusters={name: f.into(Cluster) for name, f in top.children("clusters")},
        adapters={name: f.into(Adapter) for name, f in top.children("adapters")},
        refused={name: f.into(Refused) for name, f in top.children("refused")},
        objects={name: f.take_only("size_bytes", int) for name, f in top.children("objects")},
    )
    top.done()
    _check_references(manifest, where)
    return manifest


def _parse_method(document: Any, where: str) -> Method:
    fields = _Fields(document, where)
    fields.document.setdefault("auto", [])
    for key in ("raw", "auto"):
        names = fields.take(key, list)
        if not all(isinstance(name, str) for name in names):
            raise BundleError(f"{where}: {key} is {names!r}, expected a list of strings")
        fields.document[key] = tuple(names)
    return fields.into(Method)


def _check_references(manifest: Manifest, where: str) -> None:
    def need(condition: bool, message: str) -> None:
        if not condition:
            raise BundleError(f"{where}: {message}; publish the bundle again")

    need(
        _BUNDLE_ID.fullmatch(manifest.bundle) is not None, f"bundle id {manifest.bundle!r} is not b- and 16 hex digits"
    )
    need(manifest.revision >= 0, f"revision is {manifest.revision}")
    need(manifest.method.name in METHODS, f"method {manifest.method.name!r}, expected one of {METHODS}")
    isolation = manifest.method.isolation
    need(isolation is None or isolation in ISOLATIONS, f"isolation {isolation!r}, expected one of {ISOLATIONS}")
    for name, shape in manifest.modules.items():
        need(shape.d_in > 0 and shape.d_out > 0, f"module {name} has shape {shape.d_out} x {shape.d_in}")
    for sha, size_bytes in manifest.objects.items():
        need(_SHA.fullmatch(sha) is not None and size_bytes > 0, f"object {sha!r} of {size_bytes} bytes")
    for name, cluster in manifest.clusters.items():
        need(cluster.num_slots > 0, f"cluster {name} has {cluster.num_slots} slots")
        for sha in (cluster.basis, cluster.cores):
            need(sha in manifest.objects, f"cluster {name} names object {sha}, which is not listed")
    slots: set[tuple[str, int]] = set()
    tenants: dict[str, str] = {}
    for adapter_id, adapter in manifest.adapters.items():
        need(adapter.mode in MODES, f"adapter {adapter_id} has mode {adapter.mode!r}, expected one of {MODES}")
        need(_SHA.fullmatch(adapter.served) is not None, f"adapter {adapter_id} has served revision {adapter.served!r}")
        if adapter.mode == "core":
            need(
                adapter.cluster in manifest.clusters
                and adapter.slot is not None
                and adapter.factors is None
                and adapter.rank is None,
                f"adapter {adapter_id} is of mode core with cluster {adapter.cluster!r}, slot {adapter.slot!r}, "
                f"factors {adapter.factors!r}, rank {adapter.rank!r}",
            )
            home = (cast(str, adapter.cluster), cast(int, adapter.slot))
            num_slots = manifest.clusters[home[0]].num_slots
            need(0 <= home[1] < num_slots, f"adapter {adapter_id} has slot {home[1]} of {num_slots}")
            need(home not in slots, f"adapter {adapter_id} shares slot {home[1]} of cluster {home[0]} with another")
            slots.add(home)
            tenant = tenants.setdefault(home[0], tenant_of(adapter_id))
            need(
                isolation is None or tenant == tenant_of(adapter_id),
                f"cluster {home[0]} holds adapters of tenants {tenant!r} and {tenant_of(adapter_id)!r}, "
                "which are to be kept apart",
            )
        else:
            need(
                adapter.factors in manifest.objects and adapter.cluster is None and adapter.slot is None,
                f"adapter {adapter_id} is of mode {adapter.mode} with factors {adapter.factors!r}, "
                f"cluster {adapter.cluster!r}, slot {adapter.slot!r}",
            )
            need(adapter.rank is not None and adapter.rank > 0, f"adapter {adapter_id} has rank {adapter.rank!r}")


class _Fields:
    """Takes typed fields out of a JSON object; what is left over at the end is refused by name."""

    def __init__(self, document: Any, where: str) -> None:
        if not isinstance(document, dict):
            raise BundleError(f"{where}: expected an object, saw {type(document).__name__}")
        self.document, self.where, self._left = dict(document), where, set(document)

    def take(self, key: str, kind: type) -> Any:
        if key not in self.document:
            raise BundleError(f"{self.where}: key {key!r} is missing")
        value = self.document[key]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) <= sys.float_info.max else math.inf
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise BundleError(f"{self.where}: {key} is {value!r}, expected {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise BundleError(f"{self.where}: {key} is {value!r}, expected a finite number")
        self._left.discard(key)
        return value

    def take_optional(self, key: str, kind: type) -> Any:
        if self.document.get(key) is None:
            self._left.discard(key)
            return None
        return self.take(key, kind)

    def take_only(self, key: str, kind: type) -> Any:
        value = self.take(key, kind)
        self.done()
        return value

    def children(self, key: str) -> list[tuple[str, _Fields]]:
        parent = self.take(key, dict)
        return [(name, _Fields(child, f"{self.where}: {key}[{name!r}]")) for name, child in parent.items()]

    def into(self, kind: type[T]) -> T:
        """Every field of the dataclass ``kind``; one with a None default may be absent."""
        values = {}
        for spec in dataclasses.fields(cast(Any, kind)):
            optional = spec.default is None
            json_type = _JSON_TYPES[str(spec.type).removesuffix(" | None")]
            values[spec.name] = (
                self.take_optional(spec.name, json_type) if optional else self.take(spec.name, json_type)
            )
        self.done()
        return kind(**values)

    def done(self) -> None:
        if self._left:
            raise BundleError(
                f"{self.where}: unknown key {sorted(self._left)[0]!r}; this build does not know what it asks for"
            )
