"""Reading and grading adapters for bases that stand already: no refit, seconds.

Plain threads, not Ray: starting Ray takes longer than projecting dozens of adapters, reads wait for the store and the
products are small and leave Python's lock. Where hundreds arrive at once, a refit on a Ray cluster is due anyway.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.adapters.base import BaseModel, read_base
from cluster.adapters.brought import UNREADABLE
from cluster.adapters.factors import Factors
from cluster.adapters.listing import list_collection
from cluster.adapters.reading import read_adapter
from cluster.adapters.record import AdapterFiles, AdapterRecord
from cluster.bundle.manifest import Manifest, Refused, tenant_of
from cluster.bundle.revisions import read_object
from cluster.compression.methods import METHODS
from cluster.errors import AdapterRefused, ConfigError, StoreForbidden, StoreMissing
from cluster.store.address import open_store
from compress_jobs.job.adapter_error import AdapterError
from compress_jobs.job.brought import say_untold
from compress_jobs.job.standalone import stand_alone
from compress_jobs.lifecycle.projection import Projection, project
from compress_jobs.lifecycle.revision import Arrival, Standing
from compress_jobs.lifecycle.source import Source
from compress_jobs.progress import say, track
from compress_jobs.report.refusals import refusal_lines, remedy_lines

_AT_ONCE = 4
"""Adapters read and projected side by side; as many are held in memory."""


@dataclass(frozen=True)
class Graded:
    """``unchanged`` are those whose source is the very version that is served already."""

    arrivals: dict[str, Arrival]
    refused: dict[str, Refused]
    unchanged: tuple[str, ...]

    def lines(self, verb: str) -> list[str]:
        arrived = [f"{verb:<10} {i} {_told(arrival)}" for i, arrival in sorted(self.arrivals.items())]
        brought = [
            f"brought    {i}: {message}"
            for i, arrival in sorted(self.arrivals.items())
            for message in arrival.record.brought.notes.values()
        ]
        return arrived + brought + refusal_lines(self.refused) + remedy_lines(self.refused)


def read_collection(source: Source, manifest: Manifest, tell: bool = True) -> tuple[BaseModel, dict[str, AdapterFiles]]:
    """The base, which must be the bundle's, and the collection's folders by id; ``tell``: what is left out of it."""
    accepted = (*manifest.base.accepted, *source.accept_base)
    base = read_base(source.base, name=manifest.base.name, accept=accepted)
    if base.fingerprint != manifest.base.fingerprint:
        raise ConfigError(
            f"--base {source.base}: its fingerprint is {base.fingerprint[:19]}..., the bundle stands on "
            f"{manifest.base.name} ({manifest.base.fingerprint[:19]}...); give that model's folder"
        )
    known = {*manifest.adapters, *source.ids, *source.restore}
    listing = list_collection(source.adapters, source.layout(manifest), known)
    if tell:
        say(*listing.left_out_lines())
        say_untold(base, source.base, listing.adapters)
    return base, {files.adapter_id: files for files in listing.adapters}


def grade(source: Source, standing: Standing, base: BaseModel, folders: Collection[AdapterFiles]) -> Graded:
    """Read each adapter once, refuse it as `run` does, or give it a grade: the basis that captures most, if the error
    there meets the gate; else truncated; else raw. Its objects, where it stands alone, are stored.

    Raises AdapterRefused where adapters were asked for by id and none can be accepted.
    """
    manifest, collection = standing.manifest, open_store(source.adapters)
    bases = _read_bases(standing, {tenant_of(files.adapter_id) for files in folders}) if folders else {}
    graded = Graded({}, {}, ())
    unchanged, refusals = [], []

    def one(files: AdapterFiles) -> Arrival | AdapterRefused | None:
        known = manifest.adapters.get(files.adapter_id)
        try:
            record, factors = read_adapter(collection, files, base)
        except AdapterRefused as refused:
            return refused
        except (StoreForbidden, StoreMissing) as error:
            return AdapterRefused(files.adapter_id, "unreadable", str(error))
        if known is not None and known.version == record.version:
            return None
        if known is not None and known.chat_template and UNREADABLE in record.brought.notes:
            told = f"{record.brought.notes[UNREADABLE]}, and its chats go through a template of its own"
            return AdapterRefused(files.adapter_id, "unreadable", told)
        own = {c: basis for c, (tenant, basis) in bases.items() if tenant in (None, tenant_of(files.adapter_id))}
        return _grade(standing, record, factors, own)

    # One thread each: the same bytes as one after the other, and no fight for the cores.
    with ThreadPoolExecutor(_AT_ONCE, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ordered = sorted(folders, key=lambda files: files.adapter_id)
        for files, result in zip(ordered, track(pool.map(one, ordered), len(ordered), "project"), strict=True):
            if isinstance(result, Arrival):
                graded.arrivals[files.adapter_id] = result
            elif isinstance(result, AdapterRefused):
                graded.refused[files.adapter_id] = Refused(result.reason, result.message)
                refusals.append(result)
            else:
                unchanged.append(files.adapter_id)
    if (source.ids or source.restore) and refusals and not graded.arrivals:
        raise refusals[0]
    return Graded(graded.arrivals, graded.refused, tuple(unchanged))


def _grade(
    standing: Standing, record: AdapterRecord, factors: Mapping[str, Factors], bases: Mapping[str, Mapping[str, Tensor]]
) -> Arrival:
    method = standing.manifest.method
    whole = any(fnmatch.fnmatchcase(record.adapter_id, pattern) for pattern in method.raw)
    basis_error = None
    if not whole and (projected := project(method.name, factors, bases, standing.dtype)) is not None:
        error = AdapterError.of(record, projected.squared_errors)
        basis_error = error.error
        if basis_error <= method.gate:
            return Arrival(record, projected, error, basis_error)
    alone = stand_alone(standing.store, factors, method, whole)
    return Arrival(record, alone, AdapterError.of(record, alone.squared_errors), basis_error)


def _read_bases(standing: Standing, tenants: Collection[str]) -> dict[str, tuple[str | None, dict[str, Tensor]]]:
    """Cluster -> the tenant it is kept to (None: anybody), and its basis; where tenants are kept apart, those of
    ``tenants`` only. All are held at once: a device that serves the bundle holds them too. Method svd has none."""
    manifest = standing.manifest
    if manifest.method.name not in METHODS:
        return {}
    apart = manifest.method.isolation == "tenant"
    owners = {adapter.cluster: tenant_of(i) for i, adapter in manifest.adapters.items() if adapter.cluster}
    return {
        name: (
            owners[name] if apart else None,
            read_object(standing.store, cluster.basis, f"cluster {name} of {manifest.bundle}"),
        )
        for name, cluster in manifest.clusters.items()
        if not apart or owners.get(name) in tenants
    }


def _told(arrival: Arrival) -> str:
    error = f"error {arrival.error.error:.4f}"
    tried = "" if arrival.basis_error is None else f" (on its best basis {arrival.basis_error:.4f})"
    if isinstance(arrival.placed, Projection):
        return f"on cluster {arrival.placed.cluster}, {error}"
    if arrival.placed.mode == "raw":
        return f"raw, whole at rank {arrival.placed.rank}, {error}{tried}"
    return f"truncated to rank {arrival.placed.rank}, {error}{tried}"
