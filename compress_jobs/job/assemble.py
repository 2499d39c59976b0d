"""From parts to objects: a cluster's basis and cores, or the factors of an adapter that stands alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.adapters.reading import read_modules
from cluster.adapters.record import AdapterRecord
from cluster.bundle.manifest import served_revision
from cluster.bundle.publish import StoredObject, put_object
from cluster.bundle.revisions import object_key
from cluster.errors import AdapterChanged, StoreMissing
from cluster.hashing import hash_tensors
from compress_jobs.job.context import JobContext
from compress_jobs.job.parts import once, read_tensors
from compress_jobs.job.standalone import StandaloneAdapter, stand_alone


@dataclass(frozen=True)
class AssembledCluster:
    """``served`` are the served revisions of the members kept, in the order of their slots."""

    basis: StoredObject
    cores: StoredObject
    served: tuple[str, ...]


@dataclass(frozen=True)
class Changed:
    """The adapter's file is no longer the one that was inspected."""

    message: str


def assemble_cluster(context: JobContext, cluster: int, num_layers: int, kept: Sequence[int]) -> AssembledCluster:
    """Join a cluster's parts into its two objects. ``kept`` are the positions, among the cluster's members, of
    the adapters that are served from it; they become slots 0, 1, ..."""
    digest = hashlib.sha256(repr(list(kept)).encode()).hexdigest()[:16]
    name = f"{context.fits}assembled/{cluster}-{digest}"

    def step() -> AssembledCluster:
        return _assemble_cluster(context, cluster, num_layers, kept)

    return once(context, name, AssembledCluster, step, lambda done: _are_stored(context, done.basis, done.cores))


def _assemble_cluster(context: JobContext, cluster: int, num_layers: int, kept: Sequence[int]) -> AssembledCluster:
    store = context.out()
    basis: dict[str, torch.Tensor] = {}
    cores: dict[str, torch.Tensor] = {}
    for layer in range(num_layers):
        for name, tensor in read_tensors(context, context.fit_key(layer, cluster)).items():
            if name.endswith((".U", ".V")):
                basis[name] = tensor
            else:
                cores[name] = tensor[list(kept)]
    stored_basis, stored_cores = put_object(store, basis), put_object(store, cores)
    served = tuple(
        served_revision("core", stored_basis.sha, hash_tensors({name: core[slot] for name, core in cores.items()}))
        for slot in range(len(kept))
    )
    return AssembledCluster(stored_basis, stored_cores, served)


def write_standalone(context: JobContext, record: AdapterRecord) -> StandaloneAdapter | Changed:
    """Store an adapter's own factors: whole if it is opted out by ``--raw``, else cut by SVD to the smallest
    rank that meets the gate (with ``--method svd``: to the given rank, if that meets it)."""
    name = f"alone/{context.options.method}-{context.options.rank}/{record.adapter_id}"

    def stands(done: StandaloneAdapter | Changed) -> bool:
        return isinstance(done, StandaloneAdapter) and _are_stored(context, done.factors)

    return once(context, name, StandaloneAdapter | Changed, lambda: _write_standalone(context, record), stands)


def _are_stored(context: JobContext, *objects: StoredObject) -> bool:
    store = context.out()
    try:
        return all(
            "sha256:" + hashlib.sha256(store.read(object_key(item.sha)).data).hexdigest() == item.sha
            for item in objects
        )
    except StoreMissing:
        return False


def _write_standalone(context: JobContext, record: AdapterRecord) -> StandaloneAdapter | Changed:
    try:
        factors = read_modules(context.adapters(), record, list(record.modules))
    except AdapterChanged as changed:
        return Changed(changed.message)
    options = context.options
    method = options.recorded_method(options.method, int(options.clusters), int(options.rank))
    return stand_alone(context.out(), factors, method, whole=options.is_raw(record.adapter_id))
