"""A manifest's bytes at the border: unknown keys, missing keys, wrong types and references that lead nowhere are
refused, so that whoever holds a ``Manifest`` may rely on it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from typing import Any, TypeVar, cast

from cluster.adapters.layout import Layout
from cluster.bundle.manifest import (
    EVIDENCE,
    FORMAT,
    ISOLATIONS,
    METHODS,
    MODES,
    Adapter,
    Base,
    Cluster,
    Manifest,
    Method,
    Refused,
    template_hash,
    tenant_of,
    with_slots,
)
from cluster.errors import BundleError, ConfigError
from cluster.layer import ModuleShape

_SHA = re.compile(r"sha256:[0-9a-f]{64}")
_BUNDLE_ID = re.compile(r"b-[0-9a-f]{16}")
_JSON_TYPES: dict[str, type] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "tuple[str, ...]": tuple,
    "dict[str, str]": dict,
}
T = TypeVar("T")


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
        base=_parse_base(top.take("base", dict), f"{where}: base"),
        method=_parse_method(top.take("method", dict), f"{where}: method"),
        modules={name: f.into(ModuleShape) for name, f in top.children("modules")},
        clusters={name: f.into(Cluster) for name, f in top.children("clusters")},
        # Manifests were written without slots for truncated and raw adapters: those get them here.
        adapters=with_slots({name: _parse_adapter(f) for name, f in top.children("adapters")}),
        refused={name: f.into(Refused) for name, f in top.children("refused")},
        objects={name: f.take_only("size_bytes", int) for name, f in top.children("objects")},
        templates=top.take_texts("templates"),
        layout=_parse_layout(top.take_optional("layout", dict), f"{where}: layout"),
    )
    top.done()
    _check_references(manifest, where)
    return manifest


def _parse_base(document: Any, where: str) -> Base:
    fields = _Fields(document, where)
    fields.take_names("accepted", optional=True)
    return fields.into(Base)


def _parse_adapter(fields: _Fields) -> Adapter:
    fields.take_texts("brought")
    return fields.into(Adapter)


def _parse_layout(document: Any, where: str) -> Layout:
    if document is None:
        return Layout()
    fields = _Fields(document, where)
    fields.take_names("id_patterns")
    try:
        return fields.into(Layout)
    except ConfigError as error:
        raise BundleError(f"{where}: {error}") from None


def _parse_method(document: Any, where: str) -> Method:
    fields = _Fields(document, where)
    fields.take_names("raw")
    fields.take_names("auto", optional=True)
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
    evidence = manifest.method.evidence
    need(evidence is None or evidence in EVIDENCE, f"evidence {evidence!r}, expected one of {EVIDENCE}")
    keep = manifest.method.keep
    need((evidence is None) == (keep is None), f"evidence {evidence!r} with keep {keep!r}")
    for name, shape in manifest.modules.items():
        need(shape.d_in > 0 and shape.d_out > 0, f"module {name} has shape {shape.d_out} x {shape.d_in}")
    for sha, size_bytes in manifest.objects.items():
        need(_SHA.fullmatch(sha) is not None and size_bytes > 0, f"object {sha!r} of {size_bytes} bytes")
    for name, cluster in manifest.clusters.items():
        need(cluster.num_slots > 0, f"cluster {name} has {cluster.num_slots} slots")
        for sha in (cluster.basis, cluster.cores):
            need(sha in manifest.objects, f"cluster {name} names object {sha}, which is not listed")
    for sha, template in manifest.templates.items():
        need(sha == template_hash(template), f"template {sha} has other content than its hash says")
    slots: set[tuple[str | int, int]] = set()
    tenants: dict[str, str] = {}
    for adapter_id, adapter in manifest.adapters.items():
        need(adapter.mode in MODES, f"adapter {adapter_id} has mode {adapter.mode!r}, expected one of {MODES}")
        need(_SHA.fullmatch(adapter.served) is not None, f"adapter {adapter_id} has served revision {adapter.served!r}")
        need(
            adapter.chat_template is None or adapter.chat_template in manifest.templates,
            f"adapter {adapter_id} names template {adapter.chat_template}, which is not listed",
        )
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
                adapter.factors in manifest.objects and adapter.cluster is None,
                f"adapter {adapter_id} is of mode {adapter.mode} with factors {adapter.factors!r}, "
                f"cluster {adapter.cluster!r}",
            )
            need(adapter.rank is not None and adapter.rank > 0, f"adapter {adapter_id} has rank {adapter.rank!r}")
            place = (cast(int, adapter.rank), cast(int, adapter.slot))
            need(place[1] >= 0, f"adapter {adapter_id} has slot {place[1]}")
            need(place not in slots, f"adapter {adapter_id} shares slot {place[1]} of rank {place[0]} with another")
            slots.add(place)


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

    def take_names(self, key: str, optional: bool = False) -> None:
        """Makes the list of strings a tuple, for ``into``."""
        if optional:
            self.document.setdefault(key, [])
        names = self.take(key, list)
        if not all(isinstance(name, str) for name in names):
            raise BundleError(f"{self.where}: {key} is {names!r}, expected a list of strings")
        self.document[key] = tuple(names)

    def take_texts(self, key: str) -> dict[str, str]:
        """An object of texts, which may be absent; kept for ``into``."""
        texts: dict[str, str] = self.take(key, dict) if key in self.document else {}
        if not all(isinstance(text, str) for text in texts.values()):
            raise BundleError(f"{self.where}: {key} is {texts!r}, expected an object of texts")
        self.document[key] = texts
        return texts

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
