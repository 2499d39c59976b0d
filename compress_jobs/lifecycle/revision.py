"""From one revision of a bundle to the next: some adapters leave, some arrive, all else is shared with the parent."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cluster.adapters.layout import Layout
from cluster.adapters.record import AdapterRecord
from cluster.bundle.manifest import Adapter, Cluster, Manifest, Refused, served_revision, with_slots
from cluster.bundle.publish import publish, put_object
from cluster.bundle.revisions import newest_revision, read_current, read_manifest, read_object
from cluster.errors import StoreMissing
from cluster.hashing import hash_tensors
from cluster.layer import ModuleShape
from cluster.store.address import open_store
from cluster.store.protocol import Store
from compress_jobs.job.adapter_error import AdapterError
from compress_jobs.job.brought import brought_fields, templates_of
from compress_jobs.job.standalone import StandaloneAdapter
from compress_jobs.lifecycle.aliased import warnings
from compress_jobs.lifecycle.projection import Projection


@dataclass(frozen=True)
class Standing:
    """CURRENT's revision as a command found it, and CURRENT's ETag then."""

    store: Store
    manifest: Manifest
    seen_current: str

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.manifest.method.dtype)
        return dtype


@dataclass(frozen=True)
class Arrival:
    """An adapter that was read and graded: on a basis, or else (``alone``) by its own factors.

    ``basis_error`` is its error on the best basis, None where it was tried on none.
    """

    record: AdapterRecord
    placed: Projection | StandaloneAdapter
    error: AdapterError
    basis_error: float | None


def open_current(out: str) -> Standing:
    """Raises StoreMissing where nothing is published, BundleError when it is not what it should be."""
    store = open_store(out)
    found = read_current(store)
    if found is None:
        raise StoreMissing(f"{out}: no CURRENT there; publish a bundle first (`run`), or check the address")
    return Standing(store, read_manifest(store, found[0].bundle, found[0].revision), found[1])


def next_revision(
    standing: Standing,
    leaving: Collection[str] = (),
    arrivals: Mapping[str, Arrival] | None = None,
    refused: Mapping[str, Refused] | None = None,
    shapes: Mapping[str, ModuleShape] | None = None,
    accepted: Collection[str] = (),
    layout: Layout | None = None,
) -> Manifest:
    """The manifest of the revision after the bundle's newest, child of CURRENT's, its new objects stored.

    An arrival replaces the adapter of its id. Bases are never touched; a cluster whose members change gets new
    cores: those that stay, packed in their order, then the arrivals. A cluster without members is dropped. An arrival
    that stands alone takes the lowest slot of its rank that is free; those that stay keep theirs. Whoever neither
    leaves nor arrives keeps its core or factors bit by bit, and with it its served revision.
    ``shapes`` are the base's modules, of which those that arrivals touch join the manifest; ``accepted`` are further
    names of the base, for all later revisions too; so is another ``layout``.
    """
    parent, arrivals = standing.manifest, arrivals or {}
    number = newest_revision(standing.store, parent.bundle) + 1
    staying = {
        adapter_id: adapter
        for adapter_id, adapter in parent.adapters.items()
        if adapter_id not in leaving and adapter_id not in arrivals
    }
    sizes = dict(parent.objects)
    adapters, clusters = dict(staying), {}
    for name, cluster in parent.clusters.items():
        members = sorted((a.slot or 0, i) for i, a in staying.items() if a.cluster == name)
        newcomers = {i: a for i, a in sorted(arrivals.items()) if _cluster_of(a) == name}
        if not members and not newcomers:
            continue
        if not newcomers and len(members) == sum(a.cluster == name for a in parent.adapters.values()):
            clusters[name] = cluster
            continue
        cores = read_object(standing.store, cluster.cores, f"cluster {name} of {parent.bundle}")
        packed = _pack(cores, [slot for slot, _ in members], newcomers.values())
        stored = put_object(standing.store, packed)
        sizes[stored.sha] = stored.size_bytes
        clusters[name] = Cluster(cluster.basis, stored.sha, len(members) + len(newcomers))
        for slot, (_, adapter_id) in enumerate(members):
            adapters[adapter_id] = replace(staying[adapter_id], slot=slot)
        for slot, (adapter_id, arrival) in enumerate(newcomers.items(), start=len(members)):
            own = {module: core[slot] for module, core in packed.items()}
            served = served_revision("core", cluster.basis, hash_tensors(own))
            adapters[adapter_id] = _entry(arrival, number, "core", served, cluster=name, slot=slot)
    for adapter_id, arrival in arrivals.items():
        if isinstance(alone := arrival.placed, StandaloneAdapter):
            sizes[alone.factors.sha] = alone.factors.size_bytes
            place = {"factors": alone.factors.sha, "rank": alone.rank}
            adapters[adapter_id] = _entry(arrival, number, alone.mode, alone.served, **place)
    needed = {sha for cluster in clusters.values() for sha in (cluster.basis, cluster.cores)}
    needed |= {adapter.factors for adapter in adapters.values() if adapter.factors}
    touched = {module for arrival in arrivals.values() for module in arrival.record.modules}
    still_refused = {i: r for i, r in (parent.refused | dict(refused or {})).items() if i not in adapters}
    templates = parent.templates | templates_of(arrival.record for arrival in arrivals.values())
    used = {adapter.chat_template for adapter in adapters.values()}
    names = {*parent.base.accepted, *accepted} - {parent.base.name}
    return replace(
        parent,
        revision=number,
        parent=parent.revision,
        base=replace(parent.base, accepted=tuple(sorted(names))),
        modules=parent.modules | {m: shape for m, shape in (shapes or {}).items() if m in touched},
        clusters=clusters,
        adapters=with_slots(dict(sorted(adapters.items()))),
        refused=dict(sorted(still_refused.items())),
        objects={sha: sizes[sha] for sha in sorted(needed)},
        templates={sha: text for sha, text in sorted(templates.items()) if sha in used},
        layout=layout or parent.layout,
    )


def publish_next(standing: Standing, manifest: Manifest, command: str, began: float) -> list[str]:
    """Publish it, with a small report.json; returns the lines that tell of it, and warn of aliases that it breaks.
    Raises as ``publish`` does."""
    parent = standing.manifest
    written = {sha: size for sha, size in manifest.objects.items() if sha not in parent.objects}
    shared = {sha: size for sha, size in manifest.objects.items() if sha in parent.objects}
    report: dict[str, Any] = {
        "command": command,
        "parent": parent.revision,
        "adapters_before": len(parent.adapters),
        "adapters_after": len(manifest.adapters),
        "bytes_written": sum(written.values()),
        "bytes_shared": sum(shared.values()),
        "seconds": round(time.monotonic() - began, 3),
    }
    publish(standing.store, manifest, (json.dumps(report, indent=1) + "\n").encode(), standing.seen_current)
    return [
        *warnings(standing.store, manifest),
        f"objects    {len(written)} written ({sum(written.values()):,} bytes), "
        f"{len(shared)} shared with revision {parent.revision} ({sum(shared.values()):,} bytes)",
        f"adapters   {len(parent.adapters)} before, {len(manifest.adapters)} now",
        f"seconds    {time.monotonic() - began:.1f}",
        f"bundle     {manifest.bundle} revision {manifest.revision} (parent {manifest.parent}), "
        f"published at {standing.store.uri}",
    ]


def _pack(cores: Mapping[str, Tensor], slots: list[int], newcomers: Collection[Arrival]) -> dict[str, Tensor]:
    """module -> the rows ``slots``, then a row for each newcomer: zero where it does not touch the module."""
    rows = [arrival.placed.cores for arrival in newcomers if isinstance(arrival.placed, Projection)]
    return {
        module: torch.cat([core[slots], *(own.get(module, torch.zeros_like(core[0])).unsqueeze(0) for own in rows)])
        for module, core in cores.items()
    }


def _cluster_of(arrival: Arrival) -> str | None:
    return arrival.placed.cluster if isinstance(arrival.placed, Projection) else None


def _entry(arrival: Arrival, revision: int, mode: str, served: str, **place: Any) -> Adapter:
    return Adapter(
        version=arrival.record.version,
        etag=arrival.record.etag,
        mode=mode,
        served=served,
        error=arrival.error.error,
        error_unweighted=arrival.error.unweighted,
        error_worst_module=arrival.error.worst_module,
        added=revision,
        **brought_fields(arrival.record),
        **place,
    )
