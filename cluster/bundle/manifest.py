"""The manifest of a revision: what a bundle holds, as strict JSON.

It is written by the job and read by the application; nothing else passes between the two. This folder's README shows
one; parsing.py is its border.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import count, filterfalse
from typing import Any

from cluster.adapters.layout import Layout
from cluster.hashing import canonical_json
from cluster.layer import ModuleShape

FORMAT = 1
MODES = ("core", "truncated", "raw")
METHODS = ("jd-full", "jd-diag", "svd")
ISOLATIONS = ("tenant",)
EVIDENCE = ("loss", "probe", "paper")


@dataclass(frozen=True)
class Base:
    """The base model: the name adapters call it by, and the hash of its config and tensor headers. ``accepted``:
    further names that adapters of this bundle may call it by."""

    name: str
    fingerprint: str
    accepted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """All that decides the bytes of a bundle besides its inputs. ``dtype`` is a torch dtype's name.

    ``auto`` names those of ``name``, ``clusters`` and ``rank`` that the job chose itself, for ``target_error``.
    ``isolation`` is "tenant" where no cluster holds adapters of two tenants (the first of two id segments).
    ``evidence`` is what the job chose the gate by, to keep the share ``keep``: "loss" on the held-out rows of a file
    with the hash ``tasks``, "probe" on the adapters' own text, or "paper" without any; None: the gate was given.
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
    evidence: str | None = None
    keep: float | None = None
    tasks: str | None = None


@dataclass(frozen=True)
class Cluster:
    """Object hashes of the shared basis and of the cores, and how many cores there are."""

    basis: str
    cores: str
    num_slots: int


@dataclass(frozen=True)
class Adapter:
    """One served adapter. ``cluster`` is set for mode core, and ``slot`` is its row of the cluster's cores; ``factors``
    and ``rank`` are set otherwise, and ``slot`` is its place among all adapters of that rank (see ``with_slots``).

    ``version`` is the hash of the source, ``served`` that of what is answered with.
    ``error`` = sum_m ||M - M^||^2 / sum_m ||M||^2 over the modules the adapter touches.
    ``brought``: what lay beside it and answers otherwise than the base's own, by kind; ``chat_template``: the hash
    of the one that its chats are answered with, among the manifest's ``templates``; None: the base's.
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
    chat_template: str | None = None
    brought: dict[str, str] = field(default_factory=dict)


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
    templates: dict[str, str] = field(default_factory=dict)
    """sha256 of each chat template that an adapter brought -> its text."""
    layout: Layout = field(default_factory=Layout)
    """How the collection's folders became ids; `add`, `update` and `compact` read it the same way."""

    def to_json(self) -> bytes:
        """Canonical bytes: sorted keys, absent optional fields left out."""
        document: dict[str, Any] = {"format": FORMAT, **asdict(self)}
        document["adapters"] = {adapter_id: _said(adapter) for adapter_id, adapter in document["adapters"].items()}
        document["method"] = _said(document["method"])
        if not self.method.auto:
            del document["method"]["auto"]
        if not self.base.accepted:
            del document["base"]["accepted"]
        if self.layout == Layout():
            del document["layout"]
        if not self.templates:
            del document["templates"]
        document["objects"] = {sha: {"size_bytes": size} for sha, size in self.objects.items()}
        return canonical_json(document, indent=1) + b"\n"

    def with_own_id(self) -> Manifest:
        """The same manifest, named by its content: revision, parent, ETags (which a re-upload of the same bytes
        changes), the base's other names, the layout and the slots of those that stand alone do not count."""
        anonymous = replace(
            self,
            bundle="",
            revision=0,
            parent=None,
            base=replace(self.base, accepted=()),
            layout=Layout(),
            adapters={adapter_id: _anonymous(adapter) for adapter_id, adapter in self.adapters.items()},
        )
        return replace(self, bundle="b-" + hashlib.sha256(anonymous.to_json()).hexdigest()[:16])

    def resident_bytes(self) -> int:
        """Bytes that a device holding every cluster and every factors object needs for them."""
        return sum(self.objects.values())


def _anonymous(adapter: Adapter) -> Adapter:
    return replace(adapter, etag="", slot=adapter.slot if adapter.rank is None else None)


def tenant_of(adapter_id: str) -> str:
    """The first segment of ``tenant/name``; "" for a plain ``name``."""
    return adapter_id.rpartition("/")[0]


def with_slots(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """The same, each truncated or raw adapter with a slot among those of its rank: the one it has, else the lowest
    that is free, in the order of ids.

    So a slot is an adapter's own for as long as it stands, in every revision; one that was left is taken by the next
    that comes.
    """
    taken: dict[int, set[int]] = defaultdict(set)
    for adapter in adapters.values():
        if adapter.rank is not None and adapter.slot is not None:
            taken[adapter.rank].add(adapter.slot)
    given = dict(adapters)
    free: dict[int, Iterator[int]] = {}
    for adapter_id in sorted(adapters):
        rank, slot = adapters[adapter_id].rank, adapters[adapter_id].slot
        if rank is not None and slot is None:
            slots = free.setdefault(rank, filterfalse(taken[rank].__contains__, count()))
            given[adapter_id] = replace(adapters[adapter_id], slot=next(slots))
    return given


def template_hash(template: str) -> str:
    return "sha256:" + hashlib.sha256(template.encode()).hexdigest()


def _said(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value not in (None, {})}


def served_revision(mode: str, *hashes: str) -> str:
    """Name of what an adapter is answered with: hash of the mode, the basis and the adapter's own tensors."""
    return "sha256:" + hashlib.sha256(canonical_json([mode, *hashes])).hexdigest()
