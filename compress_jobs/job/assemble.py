"""From parts to objects: each cluster's basis and cores, and the factors of each adapter that stands alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cluster.adapters.reading import read_modules
from cluster.adapters.record import AdapterRecord
from cluster.bundle.manifest import served_revision
from cluster.bundle.publish import StoredObject, put_object
from cluster.bundle.revisions import object_key
from cluster.errors import AdapterChanged, StoreMissing
from cluster.hashing import hash_tensors
from compress_jobs.job import tasks
from compress_jobs.job.choose import Chosen
from compress_jobs.job.context import JobContext
from compress_jobs.job.fit import Fitted
from compress_jobs.job.grade import Grades
from compress_jobs.job.parts import once, read_tensors
from compress_jobs.job.prepare import Job
from compress_jobs.job.standalone import StandaloneAdapter, stand_alone
from compress_jobs.progress import track


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


@dataclass(frozen=True)
class Assembled:
    """``clusters``: number -> its objects; ``slots``: adapter id -> (cluster, slot) of those on a basis;
    ``standalone``: the others, by id; ``changed``: adapter id -> how its file was found to be another than the one
    inspected."""

    clusters: dict[int, AssembledCluster]
    slots: dict[str, tuple[int, int]]
    standalone: dict[str, StandaloneAdapter]
    changed: dict[str, str]
    bytes_read: int


def assemble_all(
    job: Job, chosen: Chosen, fitted: Fitted, grades: Grades, records: Mapping[str, AdapterRecord]
) -> Assembled:
    """Write each cluster of ``grades`` and each adapter that stands alone."""
    calls = []
    slots: dict[str, tuple[int, int]] = {}
    for cluster, kept in sorted(grades.on_basis.items()):
        members = [i for i, label in zip(fitted.adapter_ids, fitted.labels, strict=True) if label == cluster]
        calls.append((chosen.context, cluster, fitted.num_layers, [members.index(adapter_id) for adapter_id in kept]))
        slots |= {adapter_id: (cluster, slot) for slot, adapter_id in enumerate(kept)}
    results = tasks.run_bounded(tasks.remote(assemble_cluster), calls, job.in_flight)
    clusters = {calls[index][1]: result for index, result in track(results, len(calls), "assemble")}

    alone_calls = [(chosen.context, records[adapter_id]) for adapter_id in grades.alone]
    results = tasks.run_bounded(tasks.remote(write_standalone), alone_calls, job.in_flight)
    standalone: dict[str, StandaloneAdapter] = {}
    changed: dict[str, str] = {}
    for index, result in track(results, len(alone_calls), "stand alone"):
        if isinstance(result, Changed):
            changed[grades.alone[index]] = result.message
        else:
            standalone[grades.alone[index]] = result
    bytes_read = sum(records[adapter_id].size_bytes for adapter_id in standalone)
    return Assembled(clusters, slots, standalone, changed, bytes_read)


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
    options = context.options
    name = f"alone/{options.method}-{options.rank}-{options.gate}/{record.adapter_id}"

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
    method = options.recorded_method(options.method, int(options.clusters), int(options.rank), float(options.gate))
    return stand_alone(context.out(), factors, method, whole=options.is_raw(record.adapter_id))
